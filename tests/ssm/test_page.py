"""docs/state_spaces.md is true: its examples run, and its table is that of the record."""

from __future__ import annotations

import doctest
import json
import re
import statistics
from pathlib import Path

import pytest

from tools import ssm_digits

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "state_spaces.md"
TEXT = PAGE.read_text()


def test_every_block_of_code_is_a_test() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) > 10
    # A block ends with an empty line, else doctest takes the fence for output.
    assert all(block.startswith(">>> ") and block.endswith("\n\n") for block in blocks)


def test_its_examples_run(one_thread: None) -> None:
    done = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert done.attempted > 50 and done.failed == 0


def test_its_table_is_of_the_record() -> None:
    records = [json.loads(line) for line in ssm_digits.RECORD.read_text().splitlines()]
    assert ssm_digits.markdown(records) in TEXT
    # What the page says of it: far apart, whatever the seed.
    by_init = {init: [r["accuracy"] for r in records if r["init"] == init] for init in ("legs", "random")}
    assert min(by_init["legs"]) > max(by_init["random"]) + 0.1
    assert statistics.mean(by_init["legs"]) > statistics.mean(by_init["random"]) + 0.2


def test_mamba2_without_an_order_trained_stably() -> None:
    """What the page says of five hundred steps in bfloat16: on record for both forms, on a CPU and on a GPU."""
    records = [json.loads(line) for line in (ROOT / "results" / "mamba2_digits.jsonl").read_text().splitlines()]
    assert [(r["direction"], r["steps"], r["dtype"]) for r in records] == [
        (direction, 500, "bfloat16 autocast") for direction in ("both", "none")
    ] * 2
    assert [record["device"].startswith("NVIDIA") for record in records] == [False, False, True, True]
    for record in records:
        first, *_, last = record["losses"]
        assert last == pytest.approx(min(record["losses"]), abs=0.01) and last < 0.15 * first
        assert record["largest_gradient"] < 50 and record["accuracy"] > 0.9


def test_the_tool_makes_such_a_record(tmp_path: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.jsonl"
    assert ssm_digits.main(["--inits", "legs", "--seeds", "1", "--epochs", "1", "--out", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    on_record = json.loads(ssm_digits.RECORD.read_text().splitlines()[0])
    assert [r["train_a"] for r in records] == [False, True]
    assert all(on_record.keys() <= r.keys() and 0.1 < r["accuracy"] <= 1 for r in records)
    assert "legs" in capsys.readouterr().out


def test_the_tool_refuses_no_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ssm_digits.main(["--seeds", "0"])
    assert "--seeds and --epochs must be at least 1" in capsys.readouterr().err
