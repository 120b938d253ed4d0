"""The cells of the study: method x staleness x engine precision x seed. A cell is one run, and its name says which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.staleness.task import MAX_RESPONSE_TOKENS

UPDATES = 256
PROMPTS_PER_UPDATE = 8
SAMPLES_PER_PROMPT = 8
EVALUATIONS = 4
"""After the one at the start, at equal distances: as many in each cell."""
LEARNING_RATE = 5e-4
WARM_UP_UPDATES = 8

METHODS: dict[str, dict[str, Any]] = {
    # The paper's and their comparators, with the parameters of their papers.
    "vespo": {"name": "vespo"},
    "grpo": {"name": "grpo"},
    "gspo": {"name": "gspo"},
    "sapo": {"name": "sapo"},
    "cispo": {"name": "cispo"},
    "topr": {"name": "topr"},
    "bapo": {"name": "bapo"},
    "respo": {"name": "respo"},
    "m2po": {"name": "m2po"},
    "dppo": {"name": "dppo"},
    # What may be done about the mismatch and the shrinking of phi (docs/study.md, remedies).
    "vespo+trainer": {"name": "vespo", "correction": "trainer"},
    "vespo+split": {"name": "vespo", "correction": "split"},
    "vespo+tis": {"name": "vespo", "correction": "tis", "correction_params": {"level": "sequence", "cap": 2.0}},
    "vespo+ess": {"name": "vespo"},
    "vespo+slower": {"name": "vespo"},
    "vespo_renormalised": {"name": "vespo_renormalised"},
    "vespo_tempered": {"name": "vespo_tempered"},
    "vespo_tempered+ess": {"name": "vespo_tempered"},
    # As TOPR leaves them: responses with A >= 0 at weight 1, whatever their W.
    "vespo+flat": {"name": "vespo", "params": {"c_pos": [0, 0]}},
}
"""Name -> section ``objective``. Aggregation and advantages are the same for all: token-mean, group-mean-std."""
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "vespo+ess": {"ess_step": "phi"},
    "vespo_tempered+ess": {"ess_step": "phi"},
    # The control of ess_step, whose steps are shorter by about as much, and of whatever else shortens them.
    "vespo+slower": {"lr": 0.8 * LEARNING_RATE},
}
"""Name -> what it changes in section ``optimizer``."""
PAPER = tuple(METHODS)[:10]
REMEDIES = tuple(METHODS)[10:]

SPLITS = ("n1", "n4", "n8", "n16", "n32", "n64")
LAGS = ("lag1", "lag8", "lag64", "lag256")
REGIMES = (*SPLITS, *LAGS, "async")
"""nN: a rollout batch cut into N mini-batches. lagK: constant lag of K updates. async: at most 8 updates behind, synced
every 4, partial responses go on."""

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    # As SGLang on a GPU: weights and activations through fp8, and the keys and values too.
    "fp8": {"precision": "fp8", "engine_args": {"fp8-activations": True, "kv-cache-dtype": "fp8_e4m3"}},
}

REMEDIED = (("n8", "fp8"), ("async", "fp8"), ("n64", "fp32"), ("lag64", "fp32"))
"""Staleness and precision under which the remedies are tried."""


@dataclass(frozen=True, order=True)
class Cell:
    seed: int
    method: str
    regime: str
    precision: str = "fp32"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.regime}-{self.precision}-s{self.seed}"

    @staticmethod
    def named(name: str) -> Cell:
        method, regime, precision, seed = name.rsplit("-", 3)
        return Cell(int(seed.removeprefix("s")), method, regime, precision)

    def config(self, root: Path) -> dict[str, Any]:
        """The run's whole configuration, as a YAML file would have it; under ``root``/cells."""
        updates_per_step = int(self.regime[1:]) if self.regime in SPLITS else 1
        steps = UPDATES // updates_per_step
        train: dict[str, Any] = {
            "steps": steps,
            "prompts_per_step": PROMPTS_PER_UPDATE * updates_per_step,
            "mini_batches": updates_per_step,
        }
        if self.precision == "fp32" and self.method in PAPER:
            # The engine's log-probs are the trainer's to rounding, and these methods know no other ratio than pi / mu.
            train["old_logprobs"] = "engine"
        optimizer: dict[str, Any] = {"lr": LEARNING_RATE, "warmup_updates": WARM_UP_UPDATES, "betas": [0.9, 0.95]}
        regime: dict[str, Any] = {}
        if self.regime in LAGS:
            train["mode"], regime = "constant_lag", {"constant_lag": {"lag": int(self.regime[3:])}}
        elif self.regime == "async":
            train["mode"], regime = "asynchronous", {"asynchronous": {"max_staleness": 8, "sync_every": 4}}
        return {
            "name": self.name,
            "run_dir": str(root / "cells" / self.name),
            "seed": self.seed,
            "model": {"path": str(root / "model"), "dtype": "float32"},
            "objective": METHODS[self.method],
            "optimizer": optimizer | OPTIMIZERS.get(self.method, {}),
            "rollout": {
                "engine": "reference",
                "samples_per_prompt": SAMPLES_PER_PROMPT,
                "max_response_tokens": MAX_RESPONSE_TOKENS,
                **PRECISIONS[self.precision],
            },
            "data": {
                "train": str(root / "model" / "train.jsonl"),
                "evaluate": str(root / "model" / "heldout.jsonl"),
                "max_prompt_tokens": 64,
            },
            "reward": {"name": "benchmarks.staleness.task.boxed_answer", "workers": 1},
            "train": train,
            "evaluate": {"every": steps // EVALUATIONS, "samples_per_prompt": 4},
            "checkpoint": {"export_hf": False, "keep": 1},
            "sync": {"transport": "shared_memory"},
            "cluster": {"ranks_per_node": 1},
            # The newest quarter, for what objectives make of responses by their lengths.
            "log": {"samples_per_step": 1, "rollouts_kept": steps // EVALUATIONS},
            **regime,
        }


ON_POLICY = ("vespo", "grpo", "gspo", "sapo")
"""At N = 1 W is 1 and every method has the same gradient: what these four differ by there is chance."""


def small() -> list[Cell]:
    """Under 20 minutes on two quiet cores: no staleness and the most of it, two seeds."""
    cells = []
    for seed in (1, 2):
        cells += [Cell(seed, method, "n1") for method in ON_POLICY[:2]]
        cells += [Cell(seed, method, "n64") for method in ON_POLICY]
    return cells


def full(seeds: int = 3) -> list[Cell]:
    """Seed by seed, so that what is there at any time is a whole grid of fewer seeds."""
    cells = []
    for seed in range(1, seeds + 1):
        for regime in REGIMES:
            cells += [Cell(seed, method, regime) for method in (ON_POLICY if regime == "n1" else PAPER)]
        cells += [
            Cell(seed, method, regime, precision)
            for precision in ("bf16", "fp8")
            for regime in ("n8", "async")
            for method in PAPER
        ]
        cells += [Cell(seed, method, regime, precision) for regime, precision in REMEDIED for method in REMEDIES]
    return cells


SUITES = {"small": small, "full": full}
