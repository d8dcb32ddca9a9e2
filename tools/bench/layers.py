"""Time VMamba's token mixer by itself, as its four stages have it, forwards and forwards + backwards.

    python tools/bench/layers.py --out results/layers_gpu.jsonl

A map of each stage of VMamba-T at 224 px, through `SS2D` with one state and a ratio of 1, under bfloat16 autocast. Each
is timed only after its result and gradients of two images have been found close to float64. "graph" replays a CUDA
graph: what the GPU needs where Python keeps up; "eager" queues the layer anew each time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402

from vision_mamba import ops  # noqa: E402
from vision_mamba.layers import SS2D  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402
from vision_mamba.selftest import relative_rms  # noqa: E402
from vision_mamba.text import destination  # noqa: E402

BOUND = 2e-2  # of relative RMS error: each of eight layers in a row rounds to bfloat16


class Stage(NamedTuple):
    """A map of VMamba-T, and what the published code takes for it on an H200, in ms: forwards, with backwards."""

    channels: int
    side: int
    published: dict[str, float]


STAGES = {
    "ss2d_stage1": Stage(96, 56, dict(fwd=4.53, fwdbwd=12.8)),
    "ss2d_stage2": Stage(192, 28, dict(fwd=2.00, fwdbwd=6.19)),
    "ss2d_stage3": Stage(384, 14, dict(fwd=1.09, fwdbwd=3.69)),
    "ss2d_stage4": Stage(768, 7, dict(fwd=0.92, fwdbwd=3.93)),
}


def check(mixer: nn.Module, x: Tensor) -> float:
    """The largest error of the result and of all gradients against float64; raises ArithmeticError over the bound."""
    exact, errors = copy.deepcopy(mixer).double(), {}
    found = []
    for module, given in ((mixer, x), (exact, x.double())):
        given = given.detach().requires_grad_()
        half = module is mixer and x.dtype != torch.float32
        with (
            torch.autocast(x.device.type, x.dtype, enabled=half),
            ops.use_backend(None if module is mixer else "eager"),
        ):
            y = module(given)
        torch.manual_seed(1)
        seed = torch.randn(y.shape, device=y.device, dtype=torch.float64)
        found.append([y, *torch.autograd.grad(y, [given, *module.parameters()], seed.to(y.dtype))])
    names = ["y", "dx", *(f"d{name}" for name, _ in mixer.named_parameters())]
    errors = {name: relative_rms(a.detach(), b.detach()) for name, a, b in zip(names, *found, strict=True)}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= BOUND:
        raise ArithmeticError(f"{worst} is off by {errors[worst]:.1e}, more than {BOUND:.0e}")
    return errors[worst]


def make_step(mixer: nn.Module, x: Tensor, which: str, mode: str) -> benchmark.Step:
    cast = torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32, cache_enabled=mode != "graph")
    x = x.detach().requires_grad_(which == "fwdbwd")
    wanted = [x, *mixer.parameters()]
    dy = torch.randn_like(x)

    def step() -> Any:
        with torch.set_grad_enabled(which == "fwdbwd"), cast:
            y = mixer(x)
        return torch.autograd.grad(y, wanted, dy) if which == "fwdbwd" else y

    return benchmark.captured(step) if mode == "graph" else step


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=128, help="(default: 128)")
    parser.add_argument("--dtype", choices=benchmark.DTYPES, default="bfloat16", help="of autocast (default: bfloat16)")
    parser.add_argument("--mode", nargs="+", choices=("eager", "graph"), default=["eager", "graph"])
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a figure (default: 0.5)")
    parser.add_argument("--out", type=destination, help="append the records to this file")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    console, device = Console(), torch.device(chosen.device)
    dtype = benchmark.DTYPES[chosen.dtype] or torch.float32
    source = provenance(device)
    for name in chosen.stage:
        stage = STAGES[name]
        torch.manual_seed(0)
        mixer = SS2D(stage.channels).to(device)
        x = torch.randn(chosen.batch_size, stage.side, stage.side, stage.channels, device=device).to(dtype)
        error = check(mixer, x[:2])
        for which in stage.published:
            for mode in chosen.mode:
                figures = benchmark.measure(make_step(mixer, x, which, mode), device, chosen.seconds)
                shape = dict(B=chosen.batch_size, D=stage.channels, H=stage.side, W=stage.side)
                record = source | dict(case=name, shape=shape, dtype=chosen.dtype, mode=mode, rel_rms=error)
                record |= {"pass": which} | figures
                share = figures["ms"][1] / stage.published[which]
                console.print(f"{name} {which} {mode}: {figures['ms'][1]} ms, {share:.3f} of the published code's")
                if chosen.out:
                    with open(chosen.out, "a") as file:
                        file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
