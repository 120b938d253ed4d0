"""Engines of this process's own under a pool, as EngineGroup keeps those of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vespo.rollout import EnginePool, HttpEngine, Patience, ServedWeights, launch_engine

KEY = "a-key-for-the-test"
ADDRESS = "127.0.0.2"


class LocalLauncher:
    def __init__(self, kind: str, log_file: Path, **options: Any) -> None:
        self.kind, self.log_file, self.options = kind, log_file, options

    def launch(self, folder: Path, version: int) -> HttpEngine:
        return launch_engine(
            self.kind,  # type: ignore[arg-type]
            folder,
            weight_version=version,
            log_file=self.log_file,
            precision="fp32",
            host=ADDRESS,
            key=KEY,
            warmup_tokens=2,
            **self.options,
        )

    def relaunch(self, index: int, weights: ServedWeights) -> HttpEngine:
        return self.launch(weights.folder, weights.version)

    def post_mortem(self, index: int) -> str:
        return f"the end of {self.log_file}:\n" + "\n".join(self.log_file.read_text().splitlines()[-15:])

    @contextmanager
    def pool(self, folder: Path, **patience: Any) -> Iterator[EnginePool]:
        engine = self.launch(folder, 0)
        settings = Patience(restart_delay_s=0.1, **patience)
        pool = EnginePool([engine], launcher=self, weights=ServedWeights(folder, 0), patience=settings)
        try:
            yield pool
        finally:
            pool.shutdown()
