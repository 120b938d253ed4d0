"""Published layouts to rows of ours: small made files of each, and the files of ../shared/data where they are."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_vespo.cli import main
from megatron_vespo.samples.published import DAPO_AFTER, DAPO_BEFORE, prepare

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"{DATA} is absent")


def parquet(folder: Path, rows: list[dict]) -> Path:
    path = folder / "published.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def jsonl(folder: Path, rows: list[dict]) -> Path:
    path = folder / "published.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dapo(problem: str, answer: str, index: str) -> dict:
    content = f"{DAPO_BEFORE}\n\n{problem}\n\n{DAPO_AFTER}"
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": content, "role": "user"}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        "extra_info": {"index": index},
    }


def test_dapo_loses_its_copies_and_its_instructions(tmp_path: Path) -> None:
    rows = [dapo(f"What is ${i}+1$?", str(i + 1), f"u{i}") for i in range(3)] * 100
    rows += [dapo("What is $0+1$?", "7", "u9")]
    prepared = prepare("dapo", [parquet(tmp_path, rows)])
    assert [row["problem"] for row in prepared.rows] == ["What is $0+1$?", "What is $1+1$?", "What is $2+1$?"]
    assert prepared.rows[1] == {"id": "dapo-u1", "problem": "What is $1+1$?", "answer": "2", "source": "dapo"}
    assert (prepared.read, prepared.duplicates.dropped, len(prepared.duplicates.conflicts)) == (301, 298, 1)


@pytest.mark.parametrize(
    ("layout", "row", "wanted"),
    [
        ("gsm8k", {"question": "Q", "answer": "2+1=<<2+1=3>>3\n#### 1,234"}, ("gsm8k-1", "Q", "1234")),
        ("gsm8k", {"id": "t-0", "problem": "Q", "answer": "-72"}, ("gsm8k-t-0", "Q", "-72")),
        ("aime24", {"ID": "2024-I-4", "Problem": "Q", "Solution": "s", "Answer": 33}, ("aime24-2024-I-4", "Q", "33")),
        ("aime24", {"id": 60, "problem": "Q", "answer": "204", "year": "2024"}, ("aime24-60", "Q", "204")),
        ("aime25", {"question": "Q", "answer": "70"}, ("aime25-1", "Q", "70")),
        ("amc23", {"id": 0, "question": "Q", "answer": 27.0}, ("amc23-0", "Q", "27.0")),
        (
            "math500",
            {"problem": "Q", "answer": r"\left( 3, \frac{\pi}{2} \right)", "unique_id": "test/a/807.json", "level": 2},
            ("math500-test/a/807.json", "Q", r"\left( 3, \frac{\pi}{2} \right)"),
        ),
    ],
)
def test_each_layout(tmp_path: Path, layout: str, row: dict, wanted: tuple[str, str, str]) -> None:
    for path in (parquet(tmp_path, [row]), jsonl(tmp_path, [row])):
        prepared = prepare(layout, [path])
        assert not prepared.refused
        assert [(r["id"], r["problem"], r["answer"], r["source"]) for r in prepared.rows] == [(*wanted, layout)]


def test_what_is_dropped_is_counted_and_golds_that_fail_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"problem": "a", "answer": r"\frac{1}{2}"},
        {"problem": "A ", "answer": r"\frac{1}{2}"},
        {"problem": "b", "answer": r"\text{"},
        {"problem": " ", "answer": "1"},
        {"question": "c"},
    ]
    out = tmp_path / "new" / "math500.jsonl"
    arguments = ["prepare-data", "math500", str(jsonl(tmp_path, rows)), "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "5 rows read, 2 written" in printed and "1 duplicates dropped, 0 of another answer" in printed
    assert "2 rows that cannot be used dropped:" in printed and "line 5: no field 'answer'" in printed
    assert "1 golds that do not grade themselves correct under math, kept:" in printed and "math500-3" in printed
    assert [json.loads(line)["problem"] for line in out.read_text().splitlines()] == ["a", "b"]
    assert main(arguments) == 2 and "is there already" in capsys.readouterr().err
    again = [*arguments[:-1], str(tmp_path / "b.jsonl"), "--drop-ungradable"]
    assert main(again) == 0 and "2 rows read" not in capsys.readouterr().out
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 1


def test_a_file_of_another_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path, [{"problem": "a", "answer": "1"}])
    assert main(["prepare-data", "dapo", str(path), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert "no row of" in (error := capsys.readouterr().err) and "no field 'prompt'" in error


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "count"), [("aime24", "aime24", 30), ("amc23", "amc23", 40)])
def test_the_tool_on_published_files(tmp_path: Path, name: str, layout: str, count: int) -> None:
    tool = Path(__file__).parents[1] / "tools" / "prepare_data.py"
    command = [sys.executable, str(tool), layout, str(DATA / f"{name}.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert f"{count} rows read, {count} written" in done.stdout, done
    assert "0 golds that do not grade" in done.stdout


@needs_data
@pytest.mark.parametrize(("name", "count"), [("gsm8k_test", 1319), ("gsm8k_train", 7473)])
def test_gsm8k_is_read_whole(name: str, count: int) -> None:
    prepared = prepare("gsm8k", [DATA / f"{name}.jsonl"])
    assert prepared.read == count and not prepared.refused
    assert len(prepared.rows) + prepared.duplicates.dropped == count
    assert all(float(row["answer"]) is not None for row in prepared.rows)
