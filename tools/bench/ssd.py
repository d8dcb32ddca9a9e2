"""Time the state-space dual scan, on a GPU beside mamba_ssm's, and put the figures on record.

    python tools/bench/ssd.py --peer-path ~/src/mamba --out results/ssd.jsonl
    python tools/bench/ssd.py --device cpu --dtype float32 --backend cpu,eager --case 'cpu_*'

A case is timed only after output and every gradient have been found right at this very size, against the scan in
float64 on the first and the last item of the batch. A figure is [p20, p50, p80] of the time on the GPU in milliseconds,
the launches queued beforehand; inputs rotate. The peer is `mamba_chunk_scan_combined` with each of --peer-chunk, timed
right after ours; its autotuner chooses from trials shorter than its own, alone on the GPU (see ssd_peer).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import vision_mamba  # noqa: E402, F401  registers the operators
from bench import ssd_peer  # noqa: E402
from bench.stopwatch import Stopwatch  # noqa: E402
from vision_mamba.ops.ssd_call import GRADIENTS, SsdCall  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402
from vision_mamba.selftest import BOUNDS, relative_rms  # noqa: E402

log = logging.getLogger("bench")

#: Batch, tokens, heads, channels of a head, states.
CASES: dict[str, tuple[int, int, int, int, int]] = {
    "l196_h24_p32_n16": (128, 196, 24, 32, 16),
    "l196_h24_p64_n16": (128, 196, 24, 64, 16),
    "l196_h12_p32_n128": (128, 196, 12, 32, 128),
    "l196_h12_p64_n64": (128, 196, 12, 64, 64),
    "l196_h6_p64_n128": (128, 196, 6, 64, 128),
    "l784_h24_p32_n64": (128, 784, 24, 32, 64),
    "l784_h12_p64_n64": (128, 784, 12, 64, 64),
    "l784_h6_p64_n128": (128, 784, 6, 64, 128),
    "l3136_h6_p32_n16": (128, 3136, 6, 32, 16),
    "l3136_h6_p64_n64": (128, 3136, 6, 64, 64),
    "l3136_h6_p64_n128": (128, 3136, 6, 64, 128),
    "l16k_h24_p64_n128": (1, 16384, 24, 64, 128),
    "cpu_l196_h12_p64_n64": (4, 196, 12, 64, 64),
    "cpu_l784_h12_p64_n64": (1, 784, 12, 64, 64),
    "cpu_l3136_h6_p32_n16": (1, 3136, 6, 32, 16),
}
PEER_BOUND = 2e-2  # it is held to less than we are
COPIES = 3
QUEUE = 4_000_000  # cycles for which the GPU waits while launches are queued
Scan = Callable[[SsdCall], Tensor]


def make_call(name: str, device: torch.device, dtype: torch.dtype) -> SsdCall:
    batch, tokens, heads, channels, states = CASES[name]
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, dt = random(batch, tokens, heads, channels), random(batch, tokens, 1, heads) - 2
    B, C = (random(batch, tokens, 1, 1, states) for _ in range(2))
    A, D, bias = (random(1, heads, dtype=torch.float32) for _ in range(3))
    return SsdCall(x, dt, -torch.exp(A), B, C, D, dt_bias=0.1 * bias, dt_softplus=True)


class Subject(NamedTuple):
    """What is timed: a backend of ours, or the peer from its checkout with a chunk size."""

    backend: str
    path: Path | None = None
    chunk: int = 0

    @property
    def is_peer(self) -> bool:
        return self.path is not None

    def scan(self) -> Scan:
        if self.path is not None:
            return ssd_peer.load(self.path, self.chunk)
        return lambda call: torch.ops.vision_mamba.ssd(*call, self.backend)[0]


def leaves_of(call: SsdCall) -> dict[str, Tensor]:
    return {n: t.detach().clone().requires_grad_() for n in GRADIENTS if (t := getattr(call, n)) is not None}


def check(call: SsdCall, scan: Scan, bound: float) -> float:
    """The error of the output; raises ArithmeticError if it or a gradient is over its bound."""
    items = sorted({0, call.batch - 1})
    leaves = leaves_of(call)
    y = scan(call._replace(**leaves))  # type: ignore[arg-type]
    seed = torch.zeros_like(y)
    seed[items] = torch.randn_like(seed[items])
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), seed), strict=True))
    whole = ("x", "dt", "B", "C")
    some = {n: (t.detach()[items] if n in whole else t.detach()).double().requires_grad_() for n, t in leaves.items()}
    exact = Subject("eager").scan()(call._replace(**some))  # type: ignore[arg-type]
    gradients = torch.autograd.grad(exact, list(some.values()), seed[items].double())
    errors = {"y": relative_rms(y.detach()[items], exact.detach())}
    for name, gradient in zip(some, gradients, strict=True):
        errors[f"d{name}"] = relative_rms(found[name][items] if name in whole else found[name], gradient)
    wrong = [f"{name} {error:.1e}" for name, error in errors.items() if not error <= bound]
    if wrong:
        raise ArithmeticError(f"relative RMS errors over {bound}: {', '.join(wrong)}")
    return errors["y"]


def measure(call: SsdCall, scan: Scan, watch: Stopwatch) -> Iterator[dict[str, Any]]:
    """Figures of the forward and of the backward pass."""
    rotation, turn = [leaves_of(call) for _ in range(COPIES)], 0
    seed = torch.randn_like(scan(call))

    def inputs() -> SsdCall:
        nonlocal turn
        turn += 1
        return call._replace(**rotation[turn % COPIES])  # type: ignore[arg-type]

    def queued(prepared: Any) -> Any:
        if watch.cuda:
            torch.cuda._sleep(QUEUE)
        return prepared

    def graph() -> tuple[Tensor, list[Tensor]]:
        chosen = inputs()
        return queued((scan(chosen), [t for n in GRADIENTS if (t := getattr(chosen, n)) is not None]))

    def forward(chosen: SsdCall) -> Tensor:
        with torch.no_grad():
            return scan(chosen)

    yield {"pass": "fwd", "ms": watch.time(lambda: queued(inputs()), forward)}
    yield {"pass": "bwd", "ms": watch.time(graph, lambda both: torch.autograd.grad(both[0], both[1], seed))}


class Job(NamedTuple):
    """A scan and its gradients to compile: of the peer, one part of its candidates, or the choices in a file."""

    subject: Subject
    case: str
    part: int | None = None
    choices: Path | None = None


def compile_one(job: Job) -> str | None:
    """Fill Triton's cache on disk, beside other processes that do the same; returns what failed."""
    call, scan = make_call(job.case, torch.device("cuda"), torch.bfloat16), job.subject.scan()
    if job.part is not None:
        ssd_peer.compile_part(job.part)
    elif job.choices is not None:
        ssd_peer.choose(job.choices)
    leaves = leaves_of(call)
    try:
        y = scan(call._replace(**leaves))  # type: ignore[arg-type]
        torch.autograd.grad(y, list(leaves.values()), torch.randn_like(y))
    except Exception as failure:  # of any kind, in another process: the timing that follows meets it again
        return f"{job}: {failure}"
    return None


def compile_all(subjects: list[Subject], names: list[str], processes: int, kept: Path | None) -> None:
    """Everything that will run, compiled by several processes; the peer's choices made, and kept in a file if asked."""

    def each(jobs: Iterable[Job]) -> None:
        for failure in filter(None, pool.imap_unordered(compile_one, jobs)):
            log.warning("%s", failure)

    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        peers = [subject for subject in subjects if subject.is_peer]
        widths = {CASES[name][2:]: name for name in reversed(names)}.values()  # the first of each
        tuned = kept is not None and kept.exists()
        parts = (
            [] if tuned else [Job(s, name, part) for s in peers for name in widths for part in range(ssd_peer.PARTS)]
        )
        each([Job(s, name) for s in subjects if not s.is_peer for name in names] + parts)
        log.info("compiled")
        if not peers:
            return
        if tuned and kept is not None:
            peers[0].scan()
            ssd_peer.choose(kept)
        for subject in peers:
            for name in [] if tuned else widths:
                compile_one(Job(subject, name))  # whose autotuner now chooses
        torch.cuda.empty_cache()
        log.info("the peer has chosen")
        if kept is not None:
            kept.write_text(json.dumps(ssd_peer.choices()))
            each(Job(s, name, choices=kept) for s in peers for name in names)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="l*", help="names or patterns, with commas (default: those of GPUs)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=[str(d).removeprefix("torch.") for d in BOUNDS])
    parser.add_argument("--backend", default="triton", help="names, with commas")
    parser.add_argument("--peer-path", type=Path, help="a checkout of mamba_ssm")
    parser.add_argument("--peer-chunk", type=int, nargs="+", default=[256], help="its chunk sizes (default: 256)")
    parser.add_argument("--peer-choices", type=Path, help="file for what its autotuner chooses; read if it exists")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for a figure (default: 0.5)")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile beforehand (default: none)")
    parser.add_argument("--out", type=Path, help="append the records to this file, one JSON line a figure")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    device, dtype = torch.device(chosen.device), getattr(torch, chosen.dtype)
    names = [name for name in CASES if any(fnmatch.fnmatch(name, one) for one in chosen.case.split(","))]
    subjects = [Subject(backend) for backend in chosen.backend.split(",")]
    if chosen.peer_path:
        subjects += [Subject(ssd_peer.NAME, chosen.peer_path, chunk) for chunk in chosen.peer_chunk]
    if chosen.jobs:
        compile_all(subjects, names, chosen.jobs, chosen.peer_choices)
    source, watch, wrong = provenance(device), Stopwatch(device, chosen.seconds), False
    for name in names:
        call = make_call(name, device, dtype)
        shape = dict(zip(("batch", "tokens", "heads", "channels", "states"), CASES[name], strict=True))
        for subject in subjects:
            scan = subject.scan()
            try:
                error = check(call, scan, PEER_BOUND if subject.is_peer else BOUNDS[dtype])
            except ArithmeticError as failure:
                log.warning("skip %s on %s: %s", subject.backend, name, failure)
                wrong |= not subject.is_peer
                continue
            what = {"case": name, "op": "ssd", "backend": subject.backend, "shape": shape, "dtype": chosen.dtype}
            what |= {"chunk": subject.chunk} if subject.chunk else {}
            for figure in measure(call, scan, watch):
                record = source | what | figure | {"rel_rms": float(f"{error:.2e}")}
                log.info("%s %s %s: %s ms", name, subject.backend, figure["pass"], figure["ms"])
                if chosen.out:
                    chosen.out.parent.mkdir(parents=True, exist_ok=True)
                    with chosen.out.open("a") as file:
                        file.write(json.dumps(record) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
