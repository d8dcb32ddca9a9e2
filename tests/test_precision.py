"""tools/precision.py: what it records, and when it says that a type trains as float32 does."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import precision  # noqa: E402


def test_records_curves_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, picture = tmp_path / "precision.jsonl", tmp_path / "precision.png"
    common = ["precision.py", "--out", str(out), "--png", str(picture)]
    few = ["test_vmamba", "--device", "cpu", "--steps", "2", "--seeds", "1", "--dtypes", "float32", "bfloat16"]
    monkeypatch.setitem(precision.SETTING, "batch", 4)
    monkeypatch.setattr(sys, "argv", common + few)
    assert precision.main() == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["dtype"] for record in records] == ["float32", "bfloat16"]
    assert all(len(record["losses"]) == 2 and record["steps_left_out"] == 0 for record in records)
    first, second = (record["losses"][0] for record in records)
    assert first == pytest.approx(second, rel=0.02), "the same start and the same images"
    picture.unlink()
    monkeypatch.setattr(sys, "argv", [*common, "--draw", str(out)])
    assert precision.main() == 0 and picture.exists()
    assert [json.loads(line) for line in out.read_text().splitlines()] == records


def test_a_type_is_held_against_the_noise_of_float32() -> None:
    tails = {("float32", 0): 0.10, ("float32", 1): 0.12, ("bfloat16", 0): 0.11, ("bfloat16", 1): 0.12}
    tails |= {("float16", 0): 0.20, ("float16", 1): 0.19}
    records = [dict(case="a", dtype=dtype, seed=seed, tail=tail) for (dtype, seed), tail in tails.items()]
    found = {verdict["dtype"]: verdict for verdict in precision.verdicts(records)}
    assert found["bfloat16"]["within"] and not found["float16"]["within"]
    assert found["float16"]["noise"] == pytest.approx(0.02) and found["float16"]["off"] == pytest.approx(0.085)
