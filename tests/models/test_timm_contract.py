"""timm's own model tests, unmodified, on the small models; `make test-timm` runs them on all."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import timm

from tests.registered import SMALL, ends_in_tokens

TOOL = Path(__file__).resolve().parents[2] / "tools" / "test_timm.py"

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


def test_small_models_pass_the_whole_contract(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    done = tool("--models=test_*", f"--junitxml={report}", "-r=s")
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    passed: dict[str, set[str]] = {name: set() for name in SMALL}
    for case in ElementTree.parse(report).iter("testcase"):
        assert not list(case.iter("skipped")), f"{case.get('name')} was skipped:\n{done.stdout[-2000:]}"
        test, _, parameters = case.attrib["name"].partition("[")
        (model,) = (name for name in SMALL if re.search(rf"\b{name}\b", parameters))
        passed[model].add(test)
    for name, tests in passed.items():
        assert tests >= (TOKENS if ends_in_tokens(name) else MAPS), name


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
