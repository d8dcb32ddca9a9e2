"""timm's own model tests, unmodified, on the small models; `make test-timm` runs them on all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import timm

from tests.registered import ALL, SMALL, ends_in_tokens
from tools.test_timm import outcomes, write

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "test_timm.py"
RECORD = ROOT / "results" / "timm_contract.jsonl"
# What timm's file checks no further on images above 320 pixels.
LARGE = {"test_model_default_cfgs_non_std": "Fixed input size model > limit."}

# The tests of timm's file that run over its registry, whatever the model ends in.
CONTRACT = {
    "test_model_forward",
    "test_model_backward",
    "test_model_forward_torchscript",
    "test_model_forward_intermediates_features",
    "test_model_forward_intermediates",
    "test_prune_intermediate_layers_contract",
    "test_model_forward_fx",
    "test_model_backward_fx",
    "test_model_forward_fx_torchscript",
}
MAPS = CONTRACT | {"test_model_default_cfgs", "test_model_forward_features"}
TOKENS = CONTRACT | {"test_model_default_cfgs_non_std"}


def tool(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def read(path: Path) -> dict[str, dict[str, Any]]:
    return {record["case"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_small_models_pass_the_whole_contract(tmp_path: Path) -> None:
    done = tool("--models=test_*", f"--record={tmp_path / 'record.jsonl'}", "-r=s")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    records = read(tmp_path / "record.jsonl")
    assert list(records) == sorted(SMALL)
    for name, record in records.items():
        assert record["failed"] == record["skipped"] == {}, done.stdout[-2000:]
        assert set(record["passed"]) >= (TOKENS if ends_in_tokens(name) else MAPS), name


def test_a_record_tells_what_failed_and_what_was_skipped(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(
        """<testsuites><testsuite>
        <testcase name="test_forward[1-vim_a]" time="1.5"/>
        <testcase name="test_cfgs[1-vim_a.one]" time="0.25"/>
        <testcase name="test_cfgs[1-vim_a.two]" time="0.25"><failure message="no pool&#10;at line 3"/></testcase>
        <testcase name="test_fx[2-vim_a]" time="0"><skipped message="too large"/></testcase>
        <testcase name="test_forward[1-vim_b]" time="1"><error message="">...</error></testcase>
        </testsuite></testsuites>"""
    )
    found = outcomes(tmp_path / "report.xml")
    assert found["vim_a"] == {
        "passed": ["test_forward"],
        "skipped": {"test_fx": "too large"},
        "failed": {"test_cfgs": "no pool"},
        "seconds": 2.0,
    }
    assert found["vim_b"]["failed"].keys() == {"test_forward"} and found["vim_b"]["passed"] == []
    path = tmp_path / "record.jsonl"
    path.write_text('{"case": "vim_b", "passed": ["test_forward"]}\n{"case": "vim_c", "passed": []}\n')
    write(path, found)
    records = read(path)
    assert list(records) == ["vim_a", "vim_b", "vim_c"]
    assert records["vim_b"]["failed"] and records["vim_c"] == {"case": "vim_c", "passed": []}


def test_every_model_has_a_record_of_the_whole_contract() -> None:
    records = read(RECORD)
    assert list(records) == sorted(set(ALL) - set(SMALL))
    for name, record in records.items():
        assert record["failed"] == {} and record["skipped"] in ({}, LARGE), name
        contract = TOKENS if ends_in_tokens(name) else MAPS
        assert set(record["passed"]) | record["skipped"].keys() >= contract, name


def test_without_index_or_cache_it_says_what_to_do(tmp_path: Path) -> None:
    done = tool(f"--cache={tmp_path}", PIP_NO_INDEX="1")
    assert done.returncode == 1
    assert "put timm-" in done.stderr and str(tmp_path) in done.stderr


def test_a_truncated_archive_is_named(tmp_path: Path) -> None:
    sdist = tmp_path / f"timm-{timm.__version__}.tar.gz"
    sdist.write_bytes(b"half a download")
    done = tool(f"--cache={tmp_path}")
    assert done.returncode == 1
    assert str(sdist) in done.stderr and "delete it" in done.stderr
