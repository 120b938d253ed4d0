"""A run's checkpoints on their way to disk, beside the training that goes on."""

from __future__ import annotations

import shutil
import threading
from typing import Any

from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.policy.checkpoint_folder import commit, complete, prune, read_state, step_folder
from megatron_vespo.samples.ledger import Ledger


class Saves:
    """At most one save is under way. What went wrong with it is raised by the next call of :meth:`begin`,
    :meth:`check` or :meth:`wait`, whichever comes first: DiskFull, ClusterError, OSError."""

    def __init__(self, config: RunConfig, trainers: TrainerGroup, ledger: Ledger) -> None:
        self.config, self.trainers, self.ledger = config, trainers, ledger
        self.folder = config.directory / "checkpoints"
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def begin(self, state: dict[str, Any]) -> None:
        """Take the weights as they are, and return while they are being written (checkpoint.background). ``state``: the
        driver's, JSON-able, with ``step`` and ``version``."""
        self.wait()
        self.trainers.take_snapshot(step_folder(self.folder, state["step"]))
        # A daemon: a run that is interrupted does not wait for it.
        self._thread = threading.Thread(target=self._write, args=(state,), name="checkpoint", daemon=True)
        self._thread.start()
        if not self.config.checkpoint.background:
            self.wait()

    def wait(self) -> None:
        """Until none is under way."""
        self.settle()
        self.check()

    def settle(self) -> None:
        """As :meth:`wait`, for one who has an error of his own to raise."""
        if self._thread is not None:
            self._thread.join()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------------------------------------ in the background

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self.trainers.write_snapshot(state)
            self._commit(state)
        except BaseException as error:
            self._error = error

    def _commit(self, state: dict[str, Any]) -> None:
        """Until here a run that dies goes on from the checkpoint before, of which nothing has been removed."""
        self.ledger.make_durable(state["version"])
        commit(step_folder(self.folder, state["step"]))
        keep = self.config.checkpoint.keep
        prune(self.folder, keep)
        kept = complete(self.folder)
        # Before that many, damage to the newest would throw the run back to its start.
        if len(kept) == keep:
            self.ledger.release(read_state(kept[0])["version"])
        for batches in (self.config.directory / "ahead").glob("step_*"):
            if not (self.folder / batches.name).exists():
                shutil.rmtree(batches)
