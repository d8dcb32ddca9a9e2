"""The report: complete, right about what is broken, and honest about what is merely missing."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests import registered, tolerances
from vision_mamba import doctor, ops, selftest
from vision_mamba.ops import registry
from vision_mamba.ops.backends import eager
from vision_mamba.ops.call import ScanCall

CPU = torch.device("cpu")


def a_backend(name: str, forward=eager.forward) -> registry.Backend:
    return registry.Backend(name, lambda device: None, lambda call: None, forward, fast=False, automatic=False)


def one_percent_off(call: ScanCall, save: bool):
    y, last, saved = eager.forward(call, save)
    return y * 1.01, last, saved


def crashing(call: ScanCall, save: bool):
    raise RuntimeError("illegal instruction")


def nothing_but_nan(call: ScanCall, save: bool):
    y, last, saved = eager.forward(call, save)
    return y * float("nan"), last, saved


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the models out: they have a test of their own."""
    monkeypatch.setattr(doctor, "models", lambda: iter(()))


def by_name(findings) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_bounds_are_those_of_the_tests() -> None:
    assert {dtype: tolerances.RELATIVE_RMS[dtype] for dtype in selftest.BOUNDS} == selftest.BOUNDS


def test_versions_name_what_the_library_stands_on() -> None:
    found = by_name(doctor.versions())
    assert found["torch"].value == torch.__version__
    assert found["python"].value == ".".join(map(str, sys.version_info[:3]))
    assert {"vision_mamba", "timm", "triton", "numpy", "cuda-core", "NVRTC"} <= set(found)


def test_accelerators_are_described_and_asked(monkeypatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=140 << 30, gcnArchName="gfx942")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = by_name(doctor.machine())
    assert found["cuda:0"].value == found["cuda:1"].value == "NVIDIA H200, sm_90, 140 GiB"
    assert "accelerator" not in found
    assert {finding.topic for finding in doctor.backends()} == {"backends on cpu", "backends on cuda"}
    assert {finding.verdict for finding in doctor.backends() if finding.name == "reference"} == {doctor.OK}


def test_where_kernels_are_kept(tmp_path, monkeypatch) -> None:
    cuda = dataclasses.replace(registry.get("cuda"), unavailable=lambda device: None)
    monkeypatch.setitem(registry._backends, "cuda", cuda)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setenv("VISION_MAMBA_CACHE", str(tmp_path))
    kept = by_name(doctor.backends())["kept kernels"]
    assert kept.verdict == doctor.OK and str(tmp_path) in kept.value
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VISION_MAMBA_CACHE", str(tmp_path / "file" / "cache"))
    kept = by_name(doctor.backends())["kept kernels"]
    assert kept.verdict == doctor.WARNING and "set VISION_MAMBA_CACHE to a writable directory" in kept.value


def test_without_an_accelerator_the_cpu_is_asked(monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert ops.available_backends() == ops.available_backends("cpu")


@pytest.mark.parametrize("cuda, way_out", [(None, "install a CUDA build"), ("13.0", "update the driver")])
def test_a_gpu_that_torch_cannot_use_is_a_warning(cuda, way_out, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    finding = by_name(doctor.machine())["accelerator"]
    assert finding.verdict == doctor.WARNING and way_out in finding.value


def test_every_backend_is_listed_with_yes_or_the_reason() -> None:
    found = by_name(f for f in doctor.backends() if f.topic == "backends on cpu")
    for name, reason in ops.available_backends(CPU).items():
        assert found[name].value.startswith("yes") if reason is None else reason in found[name].value


def test_available_backends_pass_in_every_type() -> None:
    found = list(doctor.parity())
    available = [name for name, reason in ops.available_backends(CPU).items() if reason is None]
    assert {f"{name} on cpu, {kind}" for name in available for kind in ("float32", "float16", "bfloat16")} <= set(
        by_name(found)
    )
    assert [f for f in found if f.verdict != doctor.OK] == []


def test_self_test_looks_at_every_gradient() -> None:
    narrow = selftest.results(selftest.sample_call(torch.float32, low_rank=False), "eager", CPU)
    wide = selftest.results(selftest.sample_call(torch.float32, low_rank=True), "eager", CPU)
    assert set(narrow) == {"y", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias"}
    assert set(wide) == set(narrow) | {"ddt_weight"}


def test_small_models_train_a_step() -> None:
    found = by_name(doctor.models())
    assert {f"{name} on cpu" for name in registered.SMALL} <= set(found)
    assert all(finding.verdict == doctor.OK for finding in found.values())


@pytest.mark.parametrize(
    "forward, complaint",
    [
        (one_percent_off, "errs by 1.0e-02"),
        (nothing_but_nan, "errs by nan"),
        (crashing, "RuntimeError: illegal instruction"),
    ],
)
def test_a_broken_backend_is_named_and_fails(forward, complaint, quick, monkeypatch, capsys) -> None:
    monkeypatch.setitem(registry._backends, "broken", a_backend("broken", forward))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "broken on cpu, float32" in line)
    assert line.startswith("  X ") and complaint in line
    assert text.rstrip().endswith("3 broken: see the lines marked X.")
    assert "eager on cpu, float32" in text  # it went on


def test_a_missing_kernel_is_a_warning_with_its_fix(quick, monkeypatch, capsys) -> None:
    missing = dataclasses.replace(registry.get("cpu"), unavailable=lambda device: "no compiler was found; install one.")
    monkeypatch.setitem(registry._backends, "cpu", missing)
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if "install one" in line)
    assert line.startswith("  ! cpu")
    assert "1 warning" in text.splitlines()[-1]


def test_a_backend_without_its_device_is_neither(quick, monkeypatch, capsys) -> None:
    monkeypatch.setitem(registry._backends, "swift", dataclasses.replace(a_backend("swift"), fast=True))
    elsewhere = registry.Backend("elsewhere", lambda device: "needs a GPU.", lambda call: None, eager.forward)
    monkeypatch.setitem(registry._backends, "elsewhere", elsewhere)
    assert doctor.main([]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "needs a GPU" in line)
    assert line.startswith("  - elsewhere")


def test_json_says_the_same(quick, capsys) -> None:
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["summary"] == doctor.summary([doctor.Finding(**finding) for finding in report["findings"]])
    assert {finding["topic"] for finding in report["findings"]} >= {"versions", "machine", "self-test"}


def test_rich_and_plain_say_the_same(capsys) -> None:
    findings = [doctor.Finding("parts", "one", "fine"), doctor.Finding("parts", "two", "bad [red]", doctor.BROKEN)]
    assert doctor._report(findings, doctor._write_plain) == findings
    plain = capsys.readouterr().out.split()
    doctor._report(findings, doctor._rich_writer())
    assert capsys.readouterr().out.split() == plain


def test_it_is_a_command_with_help() -> None:
    command = [sys.executable, "-m", "vision_mamba.doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--json" in done.stdout and done.stderr == ""
