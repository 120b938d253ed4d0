"""Grading throughput: responses/s of each built-in reward in worker processes, against its bare function called here.

    python benchmarks/rewards.py [--responses 512] [--programs 64] [--workers 1 2] [--repeats 3]

The limit is the function called in this process, one response after the other, with no protection from what it
grades; n workers on n idle cores can reach n times that. The best of ``--repeats`` passes counts; workers are warm.
Half of the responses are right. Fast functions show what a pipe costs, slow ones what it buys.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence

from megatron_vespo.config.problems import RewardConfig
from megatron_vespo.rewards import code
from megatron_vespo.rewards.grader import Grader, build_grader
from megatron_vespo.rewards.worker import RewardWorkers

Pair = tuple[str, str]
PROSE = "We add the two and carry the one. Then $x^2 + 3x = {}$ follows, and so on. "


def integers(count: int, rng: random.Random) -> list[Pair]:
    values = [(rng.randint(0, 10**6), rng.random() < 0.5) for _ in range(count)]
    return [(PROSE.format(v) * 20 + f"\\boxed{{{v + wrong}}}", str(v)) for v, wrong in values]


def latex(count: int, rng: random.Random) -> list[Pair]:
    values = [(rng.randint(2, 99), rng.randint(2, 99), rng.random() < 0.5) for _ in range(count)]
    return [(PROSE * 20 + f"\\boxed{{{a}\\sqrt{{{b + wrong}}}}}", f"{a}\\sqrt{{{b}}}") for a, b, wrong in values]


def programs(count: int, rng: random.Random) -> list[Pair]:
    tests = json.dumps([{"input": f"{a} {b}", "output": str(a + b)} for a, b in ((1, 2), (3, 4), (-5, 5))])
    source = "```python\na, b = map(int, input().split())\nprint(a {} b)\n```"
    return [(source.format(rng.choice("+-")), tests) for _ in range(count)]


def rate(score: Callable[[Sequence[Pair]], object], pairs: Sequence[Pair], repeats: int) -> float:
    """Responses/s of the best pass."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        score(pairs)
        seconds.append(time.perf_counter() - started)
    return len(pairs) / min(seconds[1:])


def measure(title: str, grader: Grader, pairs: Sequence[Pair], workers: Sequence[int], repeats: int) -> None:
    limit = rate(lambda batch: [grader(*pair) for pair in batch], pairs, repeats)
    line = f"{title:28} {limit:12,.0f}"
    for n in workers:
        with RewardWorkers(grader, n, timeout_s=60) as pool:
            found = rate(pool.score, pairs, repeats)
        line += f" {found:12,.0f} {found / limit:6.2f}x"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=512)
    parser.add_argument("--programs", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    rng = random.Random(0)
    print(
        f"{'responses/s':28} {'in process':>12}"
        + "".join(f" {f'{n} worker(s)':>12} {'ratio':>7}" for n in options.workers)
    )
    several = {"parts": [{"name": "math"}, {"name": "format", "weight": 0.1, "params": {"boxed": True}}]}
    cases = [
        ("math, integers", {"name": "math"}, integers(options.responses, rng)),
        ("math, LaTeX", {"name": "math"}, latex(options.responses, rng)),
        ("exact", {"name": "exact"}, integers(options.responses, rng)),
        ("numeric", {"name": "numeric"}, integers(options.responses, rng)),
        ("format", {"name": "format", "params": {"boxed": True}}, integers(options.responses, rng)),
        ("math + 0.1 format", several, integers(options.responses, rng)),
    ]
    if code.sandbox_fault("isolated", code.path_of("")) is None:
        cases.append(("code, 3 tests, isolated", {"name": "code"}, programs(options.programs, rng)))
    for title, settings, pairs in cases:
        measure(title, build_grader(RewardConfig.model_validate(settings)), pairs, options.workers, options.repeats)


if __name__ == "__main__":
    main()
