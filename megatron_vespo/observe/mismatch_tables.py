"""The report's tables of the train-inference mismatch, from the stored rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_vespo.observe import markup
from megatron_vespo.observe.mismatch import Bucket, by_length, by_position, differences
from megatron_vespo.samples.store import StoreError, read_newest

TOKENS_ENOUGH = 1 << 22
"""Older batches are not read once the newer ones have so many response tokens."""

Column = tuple[str, Callable[[Bucket], str]]
OF_TOKENS: tuple[Column, ...] = (
    ("tokens", lambda b: f"{b.tokens:,}"),
    ("mean |Δ log p|", lambda b: f"{b.diff:.3g}"),
    ("largest", lambda b: f"{b.largest:.3g}"),
    ("k3", lambda b: f"{b.k3:.3g}"),
    ("KL (k1)", lambda b: f"{b.kl:.3g}"),
)
OF_RESPONSES: tuple[Column, ...] = (
    ("PPL ratio", lambda b: f"{b.ppl_ratio:.5f}"),
    ("s.d. of log W", lambda b: f"{b.log_w_deviation:.3g}"),
    ("ESS of W", lambda b: f"{b.ess:.4f}"),
)


def mismatch_tables(run_dir: Path) -> str:
    """By position and by length, over the newest stored rollouts; "" where there are none."""
    try:
        batches = read_newest(run_dir / "rollouts", TOKENS_ENOUGH)
    except StoreError as error:
        return markup.note(str(error))
    found = differences(sample for samples in batches.values() for sample in samples)
    if not len(found.values):
        return ""
    steps = f"step {min(batches)}" if len(batches) == 1 else f"steps {min(batches)}–{max(batches)}"
    count = f"{len(found.values):,} tokens of {len(found.lengths):,} responses, {steps}"
    responses: Column = ("responses", lambda b: f"{b.responses:,}")
    parts = [
        ("By position in the response", f"Over {count}.", _table(by_position(found), "position", OF_TOKENS)),
        (
            "By length of the response",
            "Over the same. W = π_old/μ of the whole response; PPL ratio: the engine's over the trainer's.",
            _table(by_length(found), "length", (responses, *OF_TOKENS, *OF_RESPONSES)),
        ),
    ]
    return "".join(f'<div class="part"><h3>{name}</h3>{markup.note(text)}{table}</div>' for name, text, table in parts)


def _table(buckets: Sequence[Bucket], what: str, columns: Sequence[Column]) -> str:
    def row(bucket: Bucket) -> str:
        return (
            f"<tr><th>{bucket.first:,}–{bucket.last:,}</th>"
            + "".join(f"<td>{f(bucket)}</td>" for _, f in columns)
            + "</tr>"
        )

    head = f"<th>{what}</th>" + "".join(f"<th>{name}</th>" for name, _ in columns)
    body = "".join(map(row, buckets))
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
