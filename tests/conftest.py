"""What tests of several files ask of: one engine of each kind for the whole session, as SGLang takes a minute or two to
start on a CPU; a converted model; engines in this process to send weights to; a Slurm cluster."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from device_here import DeviceHere
    from engine_here import EngineHere
    from served_engines import Served
    from slurm.cluster import SlurmCluster
    from slurm.tiny_job import TinyJob
    from transports_here import Weights

SGLANG_MISSING = importlib.util.find_spec("sglang") is None
SGLANG_MARKS = (
    pytest.mark.sglang,
    pytest.mark.skipif(SGLANG_MISSING, reason="SGLang is missing: `make sglang`"),
)


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``refusal(config, *overrides)``: what `megatron-vespo train` says where it refuses before it starts anything."""
    from tiny_run import processes_about

    from megatron_vespo.cli import main

    def refused(config: Path, *overrides: str) -> str:
        monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray was started"))
        code = main(["train", str(config), *overrides])
        said = capsys.readouterr().err
        assert code == 2 and "Traceback" not in said
        assert not processes_about(str(config.parent))
        return said

    return refused


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    from rollout_checkpoints import save_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(root / "first", seed=1), save_checkpoint(root / "second", seed=2)


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's HF folder and its conversion; neither is to be changed."""
    from hf_checkpoints import write_checkpoint

    from megatron_vespo.convert.convert import to_megatron

    root = tmp_path_factory.mktemp("moe")
    hf = write_checkpoint(root / "hf", "qwen3_moe")
    to_megatron(hf, root / "megatron")
    return hf, root / "megatron"


@pytest.fixture(scope="session", params=["reference", pytest.param("sglang", marks=SGLANG_MARKS)])
def served(
    request: pytest.FixtureRequest, folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    from rollout_checkpoints import load_plain
    from served_engines import Served

    from megatron_vespo.rollout import launch_engine

    log_file = tmp_path_factory.mktemp("logs") / f"{request.param}.log"
    engine = launch_engine(
        request.param, folders[0], log_file=log_file, precision="fp32", routed_experts=True, request_timeout_s=120
    )
    process = engine._process
    assert process is not None and process.pids()
    yield Served(request.param, engine, folders, (load_plain(folders[0]), load_plain(folders[1])))
    engine.shutdown()
    assert process.pids() == [], "shutdown left processes behind"


@pytest.fixture(scope="module")
def device() -> Iterator[DeviceHere]:
    """Device memory stands behind the platform; here a table of tensors does, which sender and engines share."""
    from device_here import DeviceHere

    from megatron_vespo import platform

    here = DeviceHere()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "current", lambda: here)
        yield here


@pytest.fixture(scope="module")
def engines(device: DeviceHere, folders: tuple[Path, Path]) -> Iterator[list[EngineHere]]:
    """Two reference engines in this process, with the weights of the first of ``folders``."""
    from engine_here import engine_here

    with ExitStack() as stack:
        yield [stack.enter_context(engine_here(folders[0])) for _ in range(2)]


@pytest.fixture(scope="module")
def versions(folders: tuple[Path, Path]) -> list[Weights]:
    """Of the weights that engines are sent."""
    from transports_here import three_versions

    return three_versions(folders)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    from slurm.cluster import SlurmCluster
    from slurm.tiny_job import ROOT

    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder / "cluster", 8, [ROOT, Path(sys.prefix), folder.parent]) as cluster:
        yield cluster


@pytest.fixture
def job_folder(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Under the file system that all nodes of ``cluster`` share; afterwards no job of the test runs."""
    from tiny_run import wait_until

    yield tmp_path_factory.mktemp("job")
    cluster.ask("scancel", "--user=root")
    wait_until(lambda: not cluster.job_processes(), 60, f"every process of a job to end: {cluster.job_processes()}")


@pytest.fixture(scope="session")
def trained(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """A job that has ended: three asynchronous steps, the trainer on one node and the engine on another."""
    from slurm.tiny_job import TinyJob

    apart = "--export=ALL,TRAINER_NODES=1,ROLLOUT_NODES=1"
    job = TinyJob(cluster, tmp_path_factory.mktemp("job"), 2, apart, launcher="moe_30b_vespo_async.sh")
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    return job
