"""Time whole mixers, `layers.Mamba` and `layers.Mamba2`, under bfloat16 autocast on a GPU, for the record.

    python tools/bench/mixers.py --out results/mixers.jsonl

A case is timed only after the first sequence's output and gradient have been found near those of the same weights in
float64. A figure is [p20, p50, p80] of the time on the GPU in milliseconds, the launches queued beforehand.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bench.stopwatch import Stopwatch  # noqa: E402
from vision_mamba import ops  # noqa: E402
from vision_mamba.layers import Mamba, Mamba2  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402
from vision_mamba.selftest import relative_rms  # noqa: E402

log = logging.getLogger("bench")

#: Batch, tokens, width, and the mixer of that width.
CASES: dict[str, tuple[int, int, int, Callable[[int], nn.Module]]] = {
    "mamba_b128_l197_e384": (128, 197, 384, Mamba),
    "mamba_b8_l2048_e768": (8, 2048, 768, Mamba),
    "mamba2_b128_l196_e384": (128, 196, 384, Mamba2),
    "mamba2_both_b128_l196_e384": (128, 196, 384, lambda dim: Mamba2(dim, d_state=64, direction="both")),
    "mamba2_b8_l2048_e768": (8, 2048, 768, Mamba2),
}
BOUND = 2e-2  # of a whole mixer, whose projections round too


def run(mixer: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        return mixer(x)


def check(mixer: nn.Module, x: Tensor) -> float:
    """The error of the output; raises ArithmeticError if it or that of the gradient of x is over the bound."""
    seed = torch.zeros_like(x)
    seed[0] = torch.randn_like(seed[0])
    x = x.detach().requires_grad_()
    y = run(mixer, x)
    (dx,) = torch.autograd.grad(y, x, seed.to(y.dtype))
    exact = x.detach()[:1].double().requires_grad_()
    with ops.use_backend("eager"):
        expected = copy.deepcopy(mixer).double()(exact)
    (gradient,) = torch.autograd.grad(expected, exact, seed[:1].double())
    errors = relative_rms(y.detach()[:1], expected.detach()), relative_rms(dx[:1], gradient)
    if not max(errors) <= BOUND:
        raise ArithmeticError(f"relative RMS errors of output and gradient over {BOUND}: {errors}")
    return errors[0]


def measure(mixer: nn.Module, x: Tensor, watch: Stopwatch) -> Iterator[dict[str, Any]]:
    leaves = [x.requires_grad_(), *mixer.parameters()]
    dy = torch.randn_like(run(mixer, x))

    def forward(_: None) -> None:
        with torch.no_grad():
            run(mixer, x)

    yield {"pass": "fwd", "ms": watch.time(lambda: None, forward)}
    yield {"pass": "fwd+bwd", "ms": watch.time(lambda: None, lambda _: torch.autograd.grad(run(mixer, x), leaves, dy))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="*", help="names or patterns, with commas")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for a figure (default: 0.5)")
    parser.add_argument("--out", type=Path, help="append the records to this file, one JSON line a figure")
    chosen = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    device, wrong = torch.device("cuda"), False
    source, watch = provenance(device), Stopwatch(device, chosen.seconds)
    for name, (batch, tokens, width, make) in CASES.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in chosen.case.split(",")):
            continue
        torch.manual_seed(0)
        mixer, x = make(width).to(device), torch.randn(batch, tokens, width, device=device)
        try:
            error = check(mixer, x)
        except ArithmeticError as failure:
            log.warning("skip %s: %s", name, failure)
            wrong = True
            continue
        shape = {"batch": batch, "tokens": tokens, "width": width}
        what = {"case": name, "op": type(mixer).__name__, "shape": shape, "dtype": "bfloat16 autocast"}
        for figure in measure(mixer, x, watch):
            log.info("%s %s: %s ms", name, figure["pass"], figure["ms"])
            if chosen.out:
                chosen.out.parent.mkdir(parents=True, exist_ok=True)
                with chosen.out.open("a") as file:
                    file.write(json.dumps(source | what | figure | {"rel_rms": float(f"{error:.2e}")}) + "\n")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
