"""The front page is true: its code runs, its tables are those of the record and of the registry, its files exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import LOGITS
from tools import count, macs, parity, tables
from vision_mamba import scans
from vision_mamba.ops import registry
from vision_mamba.scans import order

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
RECORDS = {record["case"]: record for record in tables.read(count.RECORD)}


@pytest.fixture
def known_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orders registered by the page are forgotten again."""
    monkeypatch.setattr(order, "_orders", dict(order._orders))


def test_its_code_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known_orders) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    (file,) = re.findall(r'dict\(file="(.*?)"\)', TEXT)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
        state = {key: tensor for key, tensor in names["model"].state_dict().items() if not key.startswith("head.")}
        if not Path(file).exists():
            saved = state
            head = {"head.fc.weight": torch.zeros(1000, 768), "head.fc.bias": torch.zeros(1000)}
            torch.save({"model": state | head}, file)  # what the page loads later on
        if file in block:
            torch.testing.assert_close(state, saved, rtol=0, atol=0)
    assert names["logits"].shape == (1, 10)
    assert names["y"].shape == (2, 64, 16) and names["y"].isfinite().all()
    assert "windows" in scans.names()


@pytest.mark.parametrize("name", tables.TABLES)
def test_its_tables_are_the_records(name: str) -> None:
    assert tables.put(TEXT, tables.TABLES[name](tables.read(tables.RESULTS / name)), name) == TEXT


def test_a_page_without_a_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have a line '<!-- table of results/ssd.jsonl -->', and one"):
        tables.put("# A page\n", "", "ssd.jsonl")


def test_all_models_are_on_record() -> None:
    assert list(RECORDS) == count.model_names()


def test_every_fixture_has_a_record_of_its_difference() -> None:
    recorded = parity.read()
    for case in parity.cases():
        off = recorded[case["model"]]["inputs"][parity.size(case)]
        assert off["logits"] <= LOGITS and off["gradients"] <= LOGITS, case["model"]
    assert recorded.keys() == tables.measured().keys()


def test_a_differing_checkpoint_would_show_in_the_record() -> None:
    case = next(c for c in parity.cases() if c["model"] == "vmamba_tiny_s1l8" and c["input"][2] == 96)
    assert max(parity.differences(case).values()) <= LOGITS
    off = parity.differences(case | {"scaled": {"classifier.norm.weight": 1.01}})
    assert off["logits"] > LOGITS and off["gradients"] > LOGITS


@pytest.mark.parametrize("name", [name for name in RECORDS if "tiny" in name])
def test_the_record_is_what_the_models_have(name: str) -> None:
    counted = count.count(name)
    assert {key: RECORDS[name][key] for key in counted} == counted


@pytest.mark.parametrize("name", macs.PUBLISHED)
def test_operations_counted_as_their_authors_do_are_as_published(name: str) -> None:
    theirs = macs.PUBLISHED[name]  # rounded to tenths
    assert abs(RECORDS[name]["gmacs_as_published"] - theirs) <= max(0.05, 0.015 * theirs)


def test_its_table_of_backends_is_the_registry() -> None:
    section = TEXT[TEXT.index("## Backends") : TEXT.index("## Speed")]
    assert sorted(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == sorted(registry.names())


def test_the_files_it_names_exist() -> None:
    named = re.findall(r"\b(?:docs|tools|configs|results)/[\w./]*\w", TEXT)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_its_command_draws_its_picture() -> None:
    assert (ROOT / "docs" / "scan_orders.png").stat().st_size < 400_000
    named = re.search(r"visualize.py order --order ([\w ]+?) --grid", TEXT)
    assert named and set(named[1].split()) <= set(scans.names())
