"""A whole run: where a trainer rank dies, the trainers are started again from the newest checkpoint, and it goes on."""

from __future__ import annotations

from megatron_vespo.cluster.ray_cluster import ClusterError
from megatron_vespo.cluster.trainer_group import RankLost
from megatron_vespo.config.load import ResolvedConfig
from megatron_vespo.loop import modes
from megatron_vespo.loop.start import open_job, open_run
from megatron_vespo.policy.checkpoint_folder import newest_step


def train(resolved: ResolvedConfig) -> None:
    """To the end of training. Whatever is not the death of a rank ends it at once: it would come again."""
    config = resolved.run
    # What shares the ranks' devices, or reads their memory, has been launched for these ranks.
    bound = config.cluster.colocate or config.sync.transport == "ipc"
    patience = Patience(0 if bound else config.cluster.max_restarts)
    with open_job(resolved) as job:
        while True:
            try:
                with open_run(job) as run:
                    modes.train(run)
                return
            except RankLost as error:
                patience.spend(error, newest_step(config.directory / "checkpoints"))
                print(
                    f"{error}\nThe trainers are started again, the engines stay: restart {patience.spent} of "
                    f"{patience.limit} without a new checkpoint (cluster.max_restarts)",
                    flush=True,
                )


class Patience:
    """How often the trainers may be started again without getting any further."""

    def __init__(self, limit: int) -> None:
        self.limit, self.spent = limit, 0
        self._step = -1
        self._first: RankLost | None = None

    def spend(self, error: RankLost, step: int) -> None:
        """``step``: of the newest checkpoint, 0 where there is none. Raises ClusterError with the first of the deaths
        since it was written, where there were too many."""
        if step > self._step:
            self._step, self.spent, self._first = step, 0, error
        if self.limit == 0:
            raise error
        if self.spent == self.limit:
            raise ClusterError(
                f"{self._first}\n--- This was the first of {self.spent + 1} deaths of a trainer rank since the "
                f"checkpoint of step {step} (cluster.max_restarts = {self.limit})."
            ) from error
        self.spent += 1
