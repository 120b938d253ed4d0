"""How the engines of a run get the trainer's weights, whatever happens to an engine meanwhile, and how it is proven."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from megatron_vespo.cluster.engine_group import EngineGroup
from megatron_vespo.cluster.trainer_group import TrainerGroup
from megatron_vespo.cluster.turns import Turns
from megatron_vespo.cluster.weight_sender import sync_folder
from megatron_vespo.config.schema import RunConfig
from megatron_vespo.observe.metrics import MetricSums
from megatron_vespo.observe.mismatch import add_probe
from megatron_vespo.rollout.protocol import Engine, EngineError
from megatron_vespo.rollout.restart import ServedWeights
from megatron_vespo.samples.records import Sample
from megatron_vespo.weights.sync import SyncError, SyncReport
from megatron_vespo.weights.transports.disk import version_folder

PROBE_SEQUENCES = 4


class WeightSync:
    """Belongs to the thread that made it, which is the one that trains: no update may run beside a sync."""

    def __init__(self, config: RunConfig, trainers: TrainerGroup, engines: EngineGroup, turns: Turns) -> None:
        self.config, self.trainers, self.engines, self.turns = config, trainers, engines, turns
        self.served = 0
        """The version that the engines serve."""
        self.probe: list[Sample] = []
        """Responses whose log-probs are compared after each sync."""
        self._thread = threading.get_ident()

    def publish(self, version: int) -> SyncReport:
        """To every engine that serves. One that dies meanwhile is restarted, and brought to this version then."""
        pool, config = self.engines.pool, self.config
        self.turns.hand_over()
        pool.find_dead()
        while True:
            urls = [engine.url for engine in (*pool.engines, *pool.stale)]
            try:
                with pool.updating():
                    report = self.trainers.publish(version, urls, self.engines.key)
                break
            except EngineError:
                if config.sync.transport == "broadcast":
                    raise  # rank 0's device may stand in a broadcast that nobody ends
                pool.find_dead()
                if urls == [engine.url for engine in (*pool.engines, *pool.stale)]:
                    raise
        if config.sync.transport == "disk":
            folder = version_folder(sync_folder(config), version)
            pool.catch_up(ServedWeights(folder, version))
        else:
            pool.expect(None)
            pool.admit(version)
        self.served = version
        self.keep(version)
        return report

    def keep(self, version: int) -> None:
        """Engines sample by these weights from now on: log pi_old may be asked for once the trainer has others."""
        if self.config.keeps_weights:
            self.trainers.keep_weights(version, version - self.config.asynchronous.max_staleness)

    def refresh(self, version: int) -> None:
        """For engines that were restarted and wait for weights which lie in no folder. Elsewhere than in the thread
        that trains it does nothing: that one comes here too, as soon as it waits for responses."""
        if threading.get_ident() == self._thread:
            self.publish(version)
            self.turns.engines()

    def keep_probe(self, samples: Sequence[Sample]) -> None:
        """The first responses that a run has are those that it probes with."""
        self.probe = self.probe or [s for s in samples if len(s.response_tokens)][:PROBE_SEQUENCES]

    def measure(self, version: int, metrics: MetricSums) -> None:
        """How far the engines' log-probs of the probe are from the trainer's."""
        if not self.probe:
            return
        expected = self.trainers.compute_logprobs(self.probe, 1.0)
        self.turns.engines()
        sequences = [np.concatenate([s.prompt.tokens, s.response_tokens]) for s in self.probe]
        probe, tolerance = self.probe, self.config.sync.probe_tolerance

        def differences(scores: Sequence[np.ndarray]) -> np.ndarray:
            """[tokens] of one engine. Raises SyncError where one is too large."""
            found = np.concatenate(
                [
                    ours - scored[len(sample.prompt.tokens) - 1 :]
                    for sample, ours, scored in zip(probe, expected, scores, strict=True)
                ]
            )
            worst = float(np.abs(found).max(initial=0.0))
            if tolerance is not None and not worst <= tolerance:
                raise SyncError(
                    f"after the sync to version {version} an engine's log-probs differ from the trainer's by "
                    f"{worst:.3g} (sync.probe_tolerance = {tolerance:g}): weights did not arrive whole, "
                    "or precisions differ"
                )
            return found

        add_probe(metrics, np.concatenate([differences(s) for s in self.engines.pool.score(sequences)]))

        def proof(engine: Engine) -> None:
            try:
                differences(engine.score(sequences))
            except SyncError as error:
                raise EngineError(str(error)) from None

        self.engines.pool.set_proof(proof)
