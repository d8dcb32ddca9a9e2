"""The benchmark's parts that are not a stopwatch: cases, the check before timing, tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

from bench import counters, floor, host, plot, render, run
from bench.cases import CASES, ScanCase, make_call

from vision_mamba.ops import contract, selective_scan

SMALL = ScanCase(2, 4, 8, 3, 4, 5, rank=2)
CLASSIC = ScanCase(2, 3, 8, 3, 1, 20, order=None)


def test_cases_keep_the_contract() -> None:
    for case in (SMALL, CLASSIC, CASES["vmamba_t_stage4_b1"], CASES["vim_s_b1"]):
        contract.check(make_call(case, torch.bfloat16, torch.device("cpu")))


@pytest.mark.parametrize("case", [SMALL, CLASSIC], ids=["cross", "classic"])
def test_ours_passes_the_check_and_a_wrong_scan_does_not(case: ScanCase) -> None:
    call = make_call(case, torch.float32, torch.device("cpu"))
    peers = {
        "right": lambda *t: selective_scan(*t[:6], delta_bias=t[6], delta_softplus=True, backend="eager"),
        "wrong": lambda *t: selective_scan(*t[:6], delta_bias=t[6] * 1.1, delta_softplus=True, backend="eager"),
    }
    found = {subject.name: subject for subject in run.subjects(case, call, ["eager"], peers)}
    assert run.check(found["eager"], case.batch) < 1e-5
    assert run.check(found["right"], case.batch) < 1e-5
    with pytest.raises(ArithmeticError, match="ddelta"):
        run.check(found["wrong"], case.batch)


def test_table() -> None:
    record = dict(device="a CPU", threads=2, torch="2", dtype="float32", case="c", peak_mib=1.5, rel_rms=1e-7)
    records = [
        record | {"backend": "cpu", "pass": "fwd", "ms": [9.0, 9.0, 9.0]},
        record | {"backend": "cpu", "pass": "fwd", "ms": [1.0, 2.0, 3.0]},
        record | {"backend": "theirs", "pass": "fwd", "ms": [70.0, 80.0, 90.0]},
    ]
    lines = render.table(records).splitlines()
    assert "| c | cpu | 2 (1 to 3) | 1.5 | 1.0e-07 |" in lines
    assert "| c | theirs | 80 (70 to 90), 40x | 1.5 | 1.0e-07 |" in lines


def test_growth_along_one_axis() -> None:
    points = [("grow_tokens_100", 1.0), ("grow_tokens_200", 2.0), ("grow_tokens_400", 4.0), ("grow_states_2", 1.0)]
    records = [{"case": case, "backend": "cpu", "pass": "fwd", "ms": [0, ms, 9]} for case, ms in points]
    assert render.growth(records) == ["\ntime over tokens from 100 to 400, cpu, fwd: exponent 1.00"]


def test_picture_of_growth(tmp_path: Path) -> None:
    record = dict(device="a GPU", torch="2", dtype="bfloat16", backend="cuda")
    records = [
        record | {"case": f"grow_tokens_{n}", "pass": which, "ms": [1, n / 100, 2], "shape": {"width": n}}
        for n in (100, 1000)
        for which in ("fwd", "bwd")
    ]
    plot.draw(records, ["tokens"], tmp_path / "new" / "growth.png")
    assert (tmp_path / "new" / "growth.png").stat().st_size > 5000
    with pytest.raises(SystemExit, match="grow_states"):
        plot.draw(records, ["states"], tmp_path / "growth.png")


def test_floor_counts_bytes_and_exponentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "copied_bytes_per_ms", lambda device: 1.0)
    monkeypatch.setattr(floor, "exponentials_per_ms", lambda device: 1.0)
    call = make_call(SMALL, torch.bfloat16, torch.device("cpu"))
    # Two bytes for each of x and y (2, 20, 8), dt (2, 20, 4, 2), B and C (2, 20, 4, 3).
    forward = {"bytes": 2 * (320 + 320 + 320 + 480 + 480), "exponentials": 2 * 20 * 4 * 8 * 3}
    backward = {"bytes": 2 * (2 * (320 + 320 + 480 + 480) + 320), "exponentials": 2 * 20 * 4 * 8 * 3}
    assert floor.floor_ms(call, "fwd") == forward
    assert floor.floor_ms(call, "bwd") == backward
    assert floor.floor_ms(call, "fwdbwd") == {name: forward[name] + backward[name] for name in forward}


@pytest.mark.gpu
def test_a_call_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "BATCHES", 3)
    found = host.parts(make_call(CASES["vmamba_t_stage4_b1"], torch.bfloat16, torch.device("cuda")))
    parts = ("dispatcher", "modes", "recognition", "tensors", "launches")
    assert found["kernels"] >= 1 and sum(found[part] for part in parts) == pytest.approx(found["forward"])


def test_counters_are_read_from_the_profilers_table() -> None:
    report = "\n".join(
        (
            "==PROF== Connected to process 7",
            f'"ID","Kernel Name","{counters.DURATION}","launch__grid_size","something_else"',
            '"","","ns","",""',
            '"0","walk_forward(Params)","1,234,500.00","768","3"',
            '"1","merge","98,000","n/a","3"',
        )
    )
    assert counters.parse(report) == [
        ("walk_forward", {counters.DURATION: 1234500.0, "launch__grid_size": 768.0}),
        ("merge", {counters.DURATION: 98000.0}),
    ]
    assert counters.parse("==ERROR== no permission") == []
