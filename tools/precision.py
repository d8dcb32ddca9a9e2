"""Does half precision train as float32 does? Every family on handwritten digits, from the same starts.

    python tools/precision.py                                          # the record and its picture, on a GPU
    python tools/precision.py --captured                               # sooner, where Python holds a GPU up
    python tools/precision.py test_vmamba --device cpu --steps 20 --seeds 1 --out precision.jsonl

scikit-learn's 1,797 digits, enlarged to 64 pixels a side, a stratified fifth held out; 500 steps of AdamW. For each
seed a model starts from the same weights and sees the same batches in float32, under bfloat16 autocast, and under
float16 autocast with gradient scaling. The noise is what the seed alone changes in float32: the largest difference of
the mean loss over the last fifth of the steps. A type trains as float32 does where its mean over the seeds is no
further off. With --captured the passes of a step are replayed as a CUDA graph; the optimizer runs beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from timm.optim import create_optimizer_v2
from torch import Tensor

import vision_mamba  # noqa: F401  # registers the models
from vision_mamba.provenance import provenance
from vision_mamba.text import destination
from vision_mamba.train.images import digits

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "precision.jsonl"
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SETTING: dict[str, Any] = dict(img_size=64, batch=64, lr=1e-3, weight_decay=0.05, warmup=50)
Data = tuple[Tensor, Tensor]


def load(held_out: bool, device: torch.device) -> Data:
    """Digits (B, 1, 64, 64) about zero, and their labels."""
    found = digits(held_out)
    pixels = np.stack([np.asarray(found.image(i)) for i in range(len(found))])
    images = torch.from_numpy(pixels).unsqueeze(1).float().to(device) / 127.5 - 1
    return F.interpolate(images, size=SETTING["img_size"], mode="bilinear"), torch.tensor(found.targets, device=device)


def rate(step: int, steps: int) -> float:
    """Learning rate: it rises from a fiftieth, then falls as a cosine to 0."""
    warmup = SETTING["warmup"]
    share = (
        0.02 + 0.98 * step / warmup
        if step < warmup
        else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    )
    return float(SETTING["lr"] * share)


def captured(passes: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Forward and backward pass as a CUDA graph, which leaves the gradients where the first replay does."""

    def afresh() -> Tensor:
        for parameter in parameters:
            parameter.grad = None
        return passes()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            afresh()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for parameter in parameters:
        parameter.grad = None
    with torch.cuda.graph(graph):
        loss = passes()

    def replay() -> Tensor:
        graph.replay()
        return loss.clone()

    return replay


def train(
    name: str, dtype: str, seed: int, steps: int, data: Data, held_out: Data, graph: bool = False
) -> dict[str, Any]:
    """Train one model; its losses, what it gets right, and how often the scaler left a step out."""
    torch.manual_seed(seed)
    images, labels = data
    device, half = images.device, DTYPES[dtype]
    known = timm.get_pretrained_cfg(name)
    sized = dict(img_size=SETTING["img_size"]) if known is not None and known.fixed_input_size else {}
    model = timm.create_model(name, in_chans=1, num_classes=10, **sized).to(device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = create_optimizer_v2(
        model, "adamw", lr=SETTING["lr"], weight_decay=SETTING["weight_decay"], fused=device.type == "cuda"
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    scaler.scale(torch.zeros((), device=device))  # has its own tensors made, which a graph then reads
    shown = images[: SETTING["batch"]].clone(), labels[: SETTING["batch"]].clone()

    def passes() -> Tensor:
        with torch.autocast(device.type, half, enabled=half is not None, cache_enabled=not graph):
            loss = F.cross_entropy(model(shown[0]).float(), shown[1])
        scaler.scale(loss).backward()
        return loss.detach()

    run = captured(passes, parameters) if graph else passes
    losses: list[Tensor] = []
    left_out = 0
    for step in range(steps):
        chosen = torch.randint(len(images), (SETTING["batch"],)).to(device)
        shown[0].copy_(images[chosen]), shown[1].copy_(labels[chosen])
        if not graph:
            optimizer.zero_grad()
        losses.append(run())
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        left_out += scaler.get_scale() < before
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters()), name
    model.eval()
    with torch.no_grad(), torch.autocast(device.type, half, enabled=half is not None):
        right = (model(held_out[0]).argmax(1) == held_out[1]).float().mean().item()
    found = torch.stack(losses).tolist()
    every = max(1, steps // 50)
    return {
        "case": name,
        "dtype": dtype,
        "seed": seed,
        "steps": steps,
        "losses": [round(fmean(found[i : i + every]), 4) for i in range(0, steps, every)],
        "tail": round(fmean(found[-max(1, steps // 5) :]), 5),
        "steps_left_out": left_out,
        "accuracy": round(right, 4),
    }


def verdicts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each model and half precision: how far it is off float32, and the noise of that."""
    found = []
    for name in dict.fromkeys(record["case"] for record in records):
        tails = {dtype: [r["tail"] for r in records if (r["case"], r["dtype"]) == (name, dtype)] for dtype in DTYPES}
        noise = max((abs(a - b) for a, b in itertools.combinations(tails["float32"], 2)), default=math.nan)
        for dtype, of_seeds in tails.items():
            if dtype != "float32" and of_seeds and tails["float32"]:
                off = abs(fmean(of_seeds) - fmean(tails["float32"]))
                found.append(dict(case=name, dtype=dtype, off=off, noise=noise, within=off <= noise))
    return found


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Loss against steps, a panel a model, a line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(record["case"] for record in records))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False, sharex=True)
    colours = dict(zip(DTYPES, ("black", "tab:blue", "tab:orange"), strict=True))
    for axis, name in itertools.zip_longest(axes.flat, names):
        if name is None:
            axis.axis("off")
            continue
        for record in (r for r in records if r["case"] == name):
            every = max(1, record["steps"] // 50)
            label = record["dtype"] if record["seed"] == 0 else None
            places = [every * (i + 1) for i in range(len(record["losses"]))]
            axis.semilogy(places, record["losses"], color=colours[record["dtype"]], lw=0.8, label=label)
        axis.set_title(name, fontsize=8)
    axes.flat[0].legend(fontsize=6)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("loss", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="(default: the smallest of every family)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--steps", type=int, default=500, help="(default: 500)")
    parser.add_argument("--captured", action="store_true", help="replay the passes of a step as a CUDA graph")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=destination, default=RECORD, help=f"(default: results/{RECORD.name})")
    parser.add_argument("--png", type=destination, help="draw the curves")
    parser.add_argument("--draw", type=Path, nargs="+", help="train nothing: join these records into --out and --png")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    records: list[dict[str, Any]] = []
    for path in chosen.draw or ():
        records += map(json.loads, path.read_text().splitlines())
    if not chosen.draw:
        device = torch.device(chosen.device)
        source = provenance(device) | {"setting": SETTING, "mode": "graph" if chosen.captured else "eager"}
        names = chosen.models or [name for name in timm.list_models("test_*") if _is_ours(name)]
        data, held_out = load(False, device), load(True, device)
        runs = list(itertools.product(names, range(chosen.seeds), chosen.dtypes))
        for name, seed, dtype in track(runs, description="training", console=console):
            records.append(source | train(name, dtype, seed, chosen.steps, data, held_out, chosen.captured))
            _write(Path(chosen.out), records)
            console.print(name, seed, dtype, records[-1]["tail"], records[-1]["accuracy"], highlight=False)
    _write(Path(chosen.out), records)
    for verdict in verdicts(records):
        within = "within" if verdict["within"] else "OUTSIDE"
        console.print(
            f"{verdict['case']}, {verdict['dtype']}: {verdict['off']:.4f} off, {within} {verdict['noise']:.4f}"
        )
    if chosen.png:
        draw(records, chosen.png)
    return 0


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _is_ours(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith("vision_mamba.")


if __name__ == "__main__":
    sys.exit(main())
