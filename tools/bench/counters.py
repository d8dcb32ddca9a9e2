"""Hardware counters of the kernels of one pass over a named scan, by Nsight Compute, one JSON line a kernel.

    python tools/bench/counters.py --case 'vmamba_t_stage1_b128*,vim_s_b128' --pass fwd,bwd --out results/profile.jsonl

A record holds the case, the pass, the kernel, its milliseconds under the profiler (which empties caches before each
launch, so it is slower than in the benchmark) and COUNTERS by the names that ncu gives them: shares of peak of memory,
of instruction issue and of each pipe, bytes, occupancy, and why warps waited (warps in that state per instruction
issued). `tools/bench/run.py --list` shows the cases. Needs `ncu` on the path and leave to read counters.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bench.cases import CASES, make_call  # noqa: E402
from vision_mamba.ops.call import GRADIENTS  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402

log = logging.getLogger("bench")

DURATION = "gpu__time_duration.sum"  # nanoseconds
_REASONS = (
    *("long_scoreboard", "short_scoreboard", "barrier", "wait", "math_pipe_throttle", "mio_throttle", "lg_throttle"),
    *("not_selected", "dispatch_stall", "no_instruction", "branch_resolving", "imc_miss", "membar", "drain"),
    "selected",
)
_PIPES = ("fma", "alu", "xu", "lsu", "tensor")
COUNTERS = (
    DURATION,
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sector_hit_rate.pct",
    "l1tex__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    "sm__inst_executed.sum",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    *(f"sm__inst_executed_pipe_{pipe}.avg.pct_of_peak_sustained_active" for pipe in _PIPES),
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__warps_eligible.avg.per_cycle_active",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block",
    "launch__block_size",
    "launch__grid_size",
    *(f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio" for reason in _REASONS),
)


def parse(report: str) -> list[tuple[str, dict[str, float]]]:
    """Kernels in the order of their launches, and their counters, from ncu's raw page as CSV.

    Lines before the header (the profiler's own talk) are passed over; a counter this GPU does not have is left out.
    """
    lines = report.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    found = []
    for row in rows[1:]:  # the first names the units
        counters = {name: _number(row[name]) for name in COUNTERS if row.get(name) not in (None, "", "n/a")}
        found.append((row["Kernel Name"].split("(")[0], counters))
    return found


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def profile(case: str, which: str, dtype: str, backend: str) -> list[dict[str, Any]]:
    """Run this file once more under ncu and take down what it reports. Raises RuntimeError with ncu's words."""
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    command += ["--print-units", "base", "--metrics", ",".join(COUNTERS)]
    command += [sys.executable, __file__, "--case", case, "--pass", which, "--dtype", dtype, "--backend", backend]
    done = subprocess.run([*command, "--inside"], capture_output=True, text=True)
    kernels = parse(done.stdout)
    if done.returncode or not kernels:
        raise RuntimeError(f"ncu measured nothing of {case} {which}: {(done.stdout + done.stderr)[-2000:]}")
    what = {"case": case, "dtype": dtype, "backend": backend, "pass": which}
    return [
        what | {"kernel": kernel, "ms": round(counters[DURATION] / 1e6, 4), "counters": counters}
        for kernel, counters in kernels
    ]


def launch(case: str, which: str, dtype: str, backend: str) -> None:
    """The pass itself: once to compile and to fill caches of plans, once with the profiler on."""
    call = make_call(CASES[case], getattr(torch, dtype), torch.device("cuda"))
    grad = which == "bwd"
    leaves = {n: t.requires_grad_(grad) for n in GRADIENTS if (t := getattr(call, n)) is not None}
    for measured in (False, True):
        with torch.set_grad_enabled(grad):
            if measured and not grad:
                torch.cuda.profiler.start()
            y, _ = torch.ops.vision_mamba.cross_selective_scan(*call._replace(**leaves), backend)
            torch.cuda.synchronize()
            if not grad:
                continue
            seed = torch.randn_like(y)
            torch.cuda.synchronize()
            if measured:
                torch.cuda.profiler.start()
            torch.autograd.grad(y, list(leaves.values()), seed)
            torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="vmamba_t_*_b128*", help="names or patterns, with commas")
    parser.add_argument("--pass", dest="passes", default="fwd,bwd", help="fwd, bwd or both")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--out", type=Path, help="append the records to this file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # what runs under ncu
    chosen = parser.parse_args()
    chosen.passes = chosen.passes.split(",")
    if unknown := set(chosen.passes) - {"fwd", "bwd"}:
        parser.error(f"--pass: {', '.join(unknown)} is neither fwd nor bwd")
    patterns = chosen.case.split(",")
    chosen.cases = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen.cases:
        parser.error(f"--case: nothing is named {chosen.case}; tools/bench/run.py --list shows the names")
    return chosen


def main() -> int:
    chosen = arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if chosen.inside:
        launch(chosen.cases[0], chosen.passes[0], chosen.dtype, chosen.backend)
        return 0
    source = provenance("cuda", "csrc", "vision_mamba/ops", "tools/bench")
    for name in chosen.cases:
        for which in chosen.passes:
            for record in profile(name, which, chosen.dtype, chosen.backend):
                log.info("%s %s %s: %.4f ms", name, which, record["kernel"], record["ms"])
                if chosen.out:
                    chosen.out.parent.mkdir(parents=True, exist_ok=True)
                    with chosen.out.open("a") as file:
                        file.write(json.dumps(source | record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
