"""Time scans on this machine, ours and published ones, and put the figures on record.

    python tools/bench/run.py --case 'classic_*' --peer-path ~/src --out results/cpu_scan.jsonl
    python tools/bench/run.py --case 'vmamba_t_*_b128' --device cuda --dtype bfloat16 --backend cuda,triton

A case is timed only after its output and every gradient have been found right, in this process and at this very size,
against the scan in float64 (of the first and the last item of the batch). Inputs rotate through more memory than any
cache holds. A figure is [p20, p50, p80] in milliseconds; the best of --tries, since a busy neighbour only ever adds.
Peers are imported from the environment or from checkouts below --peer-path; one that is missing, or wrong, is skipped
and the reason is said.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bench import floor, peers, render  # noqa: E402
from bench.cases import CASES, ScanCase, make_call  # noqa: E402
from bench.stopwatch import Stopwatch  # noqa: E402
from vision_mamba import ops  # noqa: E402
from vision_mamba.ops.backends.cuda_kernels import LEAN  # noqa: E402
from vision_mamba.ops.call import GRADIENTS, ScanCall  # noqa: E402
from vision_mamba.ops.reference import take_steps  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402
from vision_mamba.selftest import BOUNDS, relative_rms  # noqa: E402

log = logging.getLogger("bench")

PASSES = ("fwd", "bwd", "fwdbwd")
MEASURED = ("csrc", "vision_mamba/ops", "vision_mamba/scans", "tools/bench")  # what a record's commit must cover
ROTATED_BYTES = 256 * 2**20  # beyond the last-level cache of CPUs and GPUs alike
MOST_COPIES = 16
PEER_BOUND = 1e-2  # peers are held to less: they sum in half precision and divide by small numbers

Inputs = dict[str, Tensor]
Scan = Callable[[Inputs], Tensor]


@dataclass
class Subject:
    """One implementation on one case: its inputs, itself, and the same scan in float64."""

    name: str
    op: str
    inputs: Inputs
    scan: Scan
    exact: Scan
    bounds: dict[torch.dtype, float]


def classic_inputs(call: ScanCall) -> Inputs:
    """The scan as one sequence per route in the classic layout (B, K*D, L), its step sizes whole."""
    routes = call.routes
    x = call.x.unsqueeze(2).expand(-1, -1, routes, -1) if call.shared_x else call.x
    dt = (
        call.dt if call.dt_weight is None else torch.einsum("blkr,kdr->blkd", call.dt, call.dt_weight.to(call.dt.dtype))
    )
    x, dt, B, C = (take_steps(t, call.indices).permute(0, 2, 3, 1) for t in (x, dt, call.B, call.C))
    assert call.D is not None and call.dt_bias is not None
    flat = dict(u=x.flatten(1, 2), delta=dt.flatten(1, 2), A=call.A.flatten(0, 1), B=B, C=C)
    flat |= dict(D=call.D.flatten(), delta_bias=call.dt_bias.flatten())
    return {name: t.contiguous() for name, t in flat.items()}


def _classic(backend: str) -> Scan:
    return lambda t: ops.selective_scan(**t, delta_softplus=True, backend=backend)  # type: ignore[arg-type,return-value]


def _peer(scan: peers.Scan) -> Scan:
    return lambda t: scan(*t.values())


def _cross(call: ScanCall, backend: str) -> Scan:
    return lambda t: torch.ops.vision_mamba.cross_selective_scan(*call._replace(**t), backend)[0]  # type: ignore[arg-type]


def subjects(case: ScanCase, call: ScanCall, backends: list[str], others: dict[str, peers.Scan]) -> Iterator[Subject]:
    """Ours first, then the peers."""
    for backend in backends:
        reason = ops.available_backends(call.x.device)[backend]
        if reason:
            log.warning("skip backend %s: %s", backend, reason)
        elif case.order is None:
            yield Subject(backend, case.op, classic_inputs(call), _classic(backend), _classic("eager"), BOUNDS)
        else:
            inputs = {name: t for name in GRADIENTS if (t := getattr(call, name)) is not None}
            yield Subject(backend, case.op, inputs, _cross(call, backend), _cross(call, "eager"), BOUNDS)
    bounds = dict.fromkeys(BOUNDS, PEER_BOUND)
    for name, scan in others.items():
        yield Subject(name, case.op, classic_inputs(call), _peer(scan), _classic("eager"), bounds)


def check(subject: Subject, batch: int) -> float:
    """The error of the output; raises ArithmeticError if it or a gradient is over its bound.

    The whole batch runs, and its first and last items are compared: the gradient of the output is 0 elsewhere.
    """
    items = sorted({0, batch - 1})
    inputs = {name: t.detach().requires_grad_() for name, t in subject.inputs.items()}
    y = subject.scan(inputs)
    seed = torch.zeros_like(y)
    seed[items] = torch.randn_like(seed[items]).bfloat16().to(seed.dtype)
    found = dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), seed), strict=True))

    whole = ("x", "dt", "B", "C", "u", "delta")
    some = {n: (t.detach()[items] if n in whole else t.detach()).double().requires_grad_() for n, t in inputs.items()}
    exact = subject.exact(some)
    gradients = torch.autograd.grad(exact, list(some.values()), seed[items].double())
    errors = {"y": relative_rms(y.detach()[items], exact.detach())}
    for name, gradient in zip(some, gradients, strict=True):
        errors[f"d{name}"] = relative_rms(found[name][items] if name in whole else found[name], gradient)
    bounds = {"y": subject.bounds[y.dtype]} | {f"d{n}": subject.bounds[t.dtype] for n, t in inputs.items()}
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= bounds[name]]
    if wrong:
        raise ArithmeticError(f"relative RMS errors over their bounds: {', '.join(wrong)}")
    return errors["y"]


def measure(subject: Subject, which: str, watch: Stopwatch, tries: int) -> dict[str, Any]:
    """The best of several tries of one pass, and its peak memory."""
    size = sum(t.numel() * t.element_size() for t in subject.inputs.values())
    copies = max(1, min(MOST_COPIES, math.ceil(ROTATED_BYTES / size)))
    grad = which != "fwd"
    # Cloning keeps the strides, and a leaf each time means that no gradient is ever added to an old one.
    rotation = [{n: t.detach().clone().requires_grad_(grad) for n, t in subject.inputs.items()} for _ in range(copies)]
    turn = 0

    def inputs() -> Inputs:
        nonlocal turn
        turn += 1
        return rotation[turn % copies]

    with torch.no_grad():
        seed = torch.randn_like(subject.scan(rotation[0]))

    def backward(y: Tensor, leaves: Inputs) -> Any:
        return torch.autograd.grad(y, list(leaves.values()), seed)

    def graph() -> tuple[Tensor, Inputs]:
        leaves = inputs()
        return subject.scan(leaves), leaves

    steps: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
        "fwd": (inputs, subject.scan),
        "bwd": (graph, lambda both: backward(*both)),
        "fwdbwd": (inputs, lambda leaves: backward(subject.scan(leaves), leaves)),
    }
    prepare, work = steps[which]
    with torch.set_grad_enabled(grad):
        peak = watch.peak_mib(prepare, work)
        found: list[tuple[list[float], float, float]] = []
        # What takes longer than a try is long enough to average its neighbours out, and is tried once.
        while not found or (len(found) < tries and found[0][0][1] < watch.seconds * 1e3):
            found.append((watch.time(prepare, work), os.getloadavg()[0], watch.host_ms))
    ms, load, host = min(found, key=lambda one: one[0][1])
    figure = {"pass": which, "ms": ms, "peak_mib": peak, "inputs_mib": round(size / 2**20, 2), "load": round(load, 1)}
    return figure | ({"host_ms": round(host, 4)} if watch.cuda else {})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="*", help="names or patterns, with commas; --list shows them (default: all)")
    parser.add_argument("--list", action="store_true", help="show the cases and leave")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=[str(d).removeprefix("torch.") for d in BOUNDS])
    parser.add_argument("--backend", help="backends, with commas (default: the fast ones that run on the device)")
    parser.add_argument("--pass", dest="passes", default="fwd,fwdbwd", help="of fwd, bwd, fwdbwd (default: fwd,fwdbwd)")
    parser.add_argument(
        "--peer-path", type=Path, action="append", default=[], help="a checkout of a peer, or their folder"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for a figure and try (default: 1)")
    parser.add_argument("--tries", type=int, default=3, help="the best of so many is kept (default: 3)")
    parser.add_argument("--out", type=Path, help="append the records to this file, one JSON line a figure")
    chosen = parser.parse_args()
    chosen.passes = chosen.passes.split(",")
    if unknown := set(chosen.passes) - set(PASSES):
        parser.error(f"--pass: {', '.join(unknown)} is none of {', '.join(PASSES)}")
    patterns = chosen.case.split(",")
    chosen.cases = [name for name in CASES if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen.cases:
        parser.error(f"--case: nothing is named {chosen.case}; --list shows the names")
    return chosen


def main() -> int:
    chosen = arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    if chosen.list:
        sys.stdout.write("".join(f"{name:32} {case}\n" for name, case in CASES.items()))
        return 0
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    available = [name for name, reason in ops.available_backends(device).items() if reason is None]
    backends = (
        chosen.backend.split(",") if chosen.backend else [b for b in available if b not in ("eager", "reference")]
    )
    source, watch, records = provenance(device, *MEASURED), Stopwatch(device, chosen.seconds), []
    others = peers.load(tuple(chosen.peer_path))
    wrong = False
    for name in chosen.cases:
        case = CASES[name]
        call = make_call(case, dtype, device)
        for subject in subjects(case, call, backends, others):
            try:
                error = check(subject, case.batch)
            except ArithmeticError as failure:
                log.warning("skip %s on %s: %s", subject.name, name, failure)
                wrong |= subject.name in backends
                continue
            what = {
                "case": name,
                "op": subject.op,
                "backend": subject.name,
                **({"lean": True} if subject.name == "cuda" and LEAN else {}),
                "shape": case.shape(),
                "dtype": chosen.dtype,
            }
            for which in chosen.passes:
                figure = measure(subject, which, watch, chosen.tries)
                if device.type == "cuda":
                    figure["floor_ms"] = floor.floor_ms(call, which)
                records.append(source | what | figure | {"rel_rms": float(f"{error:.2e}")})
                log.info("%s %s %s: %s ms", name, subject.name, which, figure["ms"])
                if chosen.out:
                    chosen.out.parent.mkdir(parents=True, exist_ok=True)
                    with chosen.out.open("a") as file:
                        file.write(json.dumps(records[-1]) + "\n")
    sys.stdout.write("\n" + render.table(records))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
