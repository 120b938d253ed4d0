"""What is started once for the whole session: an engine of each kind (SGLang takes a minute or two to start on a CPU),
and a Slurm cluster."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from served_engines import Served
    from slurm.cluster import SlurmCluster
    from slurm.tiny_job import TinyJob

SGLANG_MISSING = importlib.util.find_spec("sglang") is None
SGLANG_MARKS = (
    pytest.mark.sglang,
    pytest.mark.skipif(SGLANG_MISSING, reason="SGLang is missing: `make sglang`"),
)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape."""
    from rollout_checkpoints import save_checkpoint

    root = tmp_path_factory.mktemp("checkpoints")
    return save_checkpoint(root / "first", seed=1), save_checkpoint(root / "second", seed=2)


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
