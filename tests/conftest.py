"""One engine of each kind for the whole session: SGLang takes a minute or two to start on a CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from served_engines import Served

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
