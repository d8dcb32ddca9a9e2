"""Time whole models by their timm names: images a second, milliseconds a step and peak memory, side by side.

    python tools/benchmark.py vmamba_tiny_s1l8 convnext_tiny vit_small_patch16_224 --batch-size 128
    python tools/benchmark.py test_vmamba --device cpu --batch-size 2 --img-size 64 --pass infer
    python tools/benchmark.py vmamba_tiny_s1l8 vit_small_patch16_224 --img-size 224 384 512 --png resolution.png

How a model is run (--mode): "eager" as it is; "compile" by torch.compile, in the mode that --compile-mode says (ours
run fastest on a GPU in reduce-overhead); "graph" eager and captured in a CUDA graph, which shows what the GPU needs
where Python cannot keep up with it. The step of training (--pass train) is forward, loss and backward. A time is the
median of many runs, queued behind one another as in a training loop; "host" is what the CPU needed to queue one.
Convolutional models of timm (--channels-last) and all of ours are fastest channels last.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import vision_mamba  # noqa: F401  # registers the models
from vision_mamba.provenance import provenance
from vision_mamba.text import destination

MODES, PASSES = ("eager", "compile", "graph"), ("infer", "train")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: Of timm's models, as their papers have it: arXiv 2201.03545, 2103.14030, 2405.07992, 2012.12877 (DeiT-S).
PUBLISHED_TOP1 = {
    "convnext_tiny": 82.1,
    "swin_tiny_patch4_window7_224": 81.3,
    "mambaout_tiny": 82.7,
    "vit_small_patch16_224": 79.8,
}
CHANNELS_LAST = ("convnext*", "resnet*", "efficientnet*", "regnet*", "mobilenet*")  # of timm's, where --channels-last
Step = Callable[[], Any]


def make_step(
    model: nn.Module, images: Tensor, which: str, mode: str, dtype: torch.dtype | None, compile_mode: str = "default"
) -> Step:
    """One inference, or one step of training without an optimizer."""
    device = images.device.type
    run = torch.compile(model, mode=compile_mode) if mode == "compile" else model
    # A captured graph must not lean on casts that were made before it.
    cast = torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=mode != "graph")
    labels = torch.randint(int(model.num_classes), (len(images),), device=images.device)  # type: ignore[arg-type]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def infer() -> Any:
        with torch.no_grad(), cast:
            return run(images)

    def train() -> Any:
        with cast:
            loss = F.cross_entropy(run(images), labels)
        return torch.autograd.grad(loss, parameters)

    step = train if which == "train" else infer
    model.train(which == "train")
    return captured(step) if mode == "graph" else step


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()  # what is captured lives as long as the graph

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def measure(step: Step, device: torch.device, seconds: float) -> dict[str, Any]:
    """[p20, p50, p80] milliseconds of a step, the CPU's share, and peak memory."""
    for _ in range(3):
        step()
    figures: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        begun = time.perf_counter()
        step()
        once = time.perf_counter() - begun
        count = max(3, min(200, int(seconds / once)))
        times = [_timed(step) for _ in range(count)]
        return {"ms": _quantiles(times)}
    events: list[tuple[Any, Any]] = []
    hosts: list[float] = []
    until = time.perf_counter() + seconds
    while len(events) < 5 or (time.perf_counter() < until and len(events) < 200):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begun = time.perf_counter()
        start.record()
        step()
        end.record()
        hosts.append((time.perf_counter() - begun) * 1e3)
        events.append((start, end))
        if len(events) % 10 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    figures["ms"] = _quantiles([start.elapsed_time(end) for start, end in events])
    figures["host_ms"] = round(min(hosts), 2)
    figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    return figures


def kernels(step: Step, row: dict[str, Any]) -> str:
    """What one step ran on the GPU, the longest first: milliseconds, calls, name."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    found = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in found) / 1e3
    head = (
        f"{row['case']}, {row['img_size']} px, batch {row['batch_size']}, {row['pass']}, {row['mode']}, {row['dtype']}"
    )
    lines = [f"{e.self_device_time_total / 1e3:9.3f} {e.count:5d}  {e.key[:150]}" for e in found]
    return "\n".join([f"{head}: {whole:.2f} ms in {sum(e.count for e in found)} kernels", *lines, "", ""])


def _timed(step: Step) -> float:
    begun = time.perf_counter()
    step()
    return (time.perf_counter() - begun) * 1e3


def _quantiles(times: list[float]) -> list[float]:
    times = sorted(times)
    return [round(times[min(len(times) - 1, int(len(times) * q))], 3) for q in (0.2, 0.5, 0.8)]


def benchmark(chosen: argparse.Namespace, case: tuple[str, int, int, str, str]) -> dict[str, Any]:
    """One row: a model at a size and batch, one pass in one mode."""
    name, size, batch, which, mode = case
    device = torch.device(chosen.device)
    row: dict[str, Any] = dict(case=name, img_size=size, batch_size=batch, mode=mode, dtype=chosen.dtype)
    row["pass"] = which
    torch.manual_seed(0)
    torch.compiler.reset()
    model: nn.Module | None = None
    images: Tensor | None = None
    step: Step | None = None
    try:
        known = timm.get_pretrained_cfg(name)
        fixed = known is not None and known.fixed_input_size
        sized: dict[str, Any] = dict(img_size=size) if fixed else {}
        with device:  # random numbers for weights are drawn where they are wanted
            model = timm.create_model(name, **sized)
        if chosen.checkpointing and which == "train":
            cast(Any, model).set_grad_checkpointing()
            row["checkpointing"] = True
        images = torch.randn(batch, 3, size, size, device=device)
        if chosen.channels_last and any(fnmatch.fnmatch(name, pattern) for pattern in CHANNELS_LAST):
            model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        row["params"] = sum(parameter.numel() for parameter in model.parameters())
        compile_mode = chosen.compile_mode if mode == "compile" else "default"
        if compile_mode != "default":
            row["compile_mode"] = compile_mode
        step = make_step(model, images, which, mode, DTYPES[chosen.dtype], compile_mode)
        row |= measure(step, device, chosen.seconds)
        if mode == "graph" or compile_mode != "default":
            row.pop("peak_gib", None)  # its memory was taken when it was captured
        if chosen.kernels:
            with open(chosen.kernels, "a") as file:
                file.write(kernels(step, row))
        row["images_per_s"] = float(f"{batch / row['ms'][1] * 1e3:.4g}")
    except torch.OutOfMemoryError:
        row["error"] = "out of memory"
    except Exception as error:  # one model that cannot do something does not end the others' run
        row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
    finally:
        step = model = images = None
        if device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()  # each captured graph leaves those of its stream, near 0.1 GiB
            torch.cuda.empty_cache()
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{rows[0]['device']}, {rows[0]['dtype']}, torch {rows[0]['torch']}")
    for column in ("model", "px", "batch", "pass", "mode", "ms", "images/s", "host ms", "GiB"):
        shown.add_column(column, justify="left" if column in ("model", "pass", "mode") else "right")
    for row in rows:
        start = (row["case"], str(row["img_size"]), str(row["batch_size"]), row["pass"], row["mode"])
        if "error" in row:
            shown.add_row(*start, row["error"])
            continue
        host, peak = row.get("host_ms"), row.get("peak_gib")
        shown.add_row(
            *start, f"{row['ms'][1]:.2f}", f"{row['images_per_s']:.0f}", "" if host is None else f"{host:.1f}",
            "" if peak is None else f"{peak:.2f}",
        )  # fmt: skip
    return shown


def write_csv(rows: list[dict[str, Any]], path: str) -> None:
    """timm's columns: infer_samples_per_sec and so on."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if "error" in row:
            continue
        line = lines.setdefault(
            (row["case"], row["img_size"], row["batch_size"], row["mode"]),
            {"model": row["case"], "mode": row["mode"], "param_count": round(row["params"] / 1e6, 2)},
        )
        for key, value in (
            ("samples_per_sec", row["images_per_s"]),
            ("step_time", row["ms"][1]),
            ("batch_size", row["batch_size"]),
            ("img_size", row["img_size"]),
        ):
            line[f"{row['pass']}_{key}"] = value
    columns = list(dict.fromkeys(key for line in lines.values() for key in line))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(lines.values())


def draw(rows: list[dict[str, Any]], path: str) -> None:
    """Images a second against the image's side, one line a model, pass and mode; bars where there is one side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = sorted({(row["pass"], row["batch_size"]) for row in rows})
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False)
    for axis, (which, batch) in zip(axes[0], kinds, strict=True):
        own = [row for row in rows if (row["pass"], row["batch_size"]) == (which, batch)]
        lines = {(row["case"], row["mode"]): [] for row in own}  # type: ignore[var-annotated]
        for row in own:
            lines[row["case"], row["mode"]].append((row["img_size"], row["images_per_s"]))
        if all(len(points) == 1 for points in lines.values()):
            axis.barh([f"{name}, {mode}" for name, mode in lines], [points[0][1] for points in lines.values()])
            axis.set_xlabel("images a second")
        else:
            for (name, mode), points in lines.items():
                axis.loglog(*zip(*sorted(points), strict=True), marker="o", label=f"{name}, {mode}")
            sides = sorted({row["img_size"] for row in own})
            axis.set_xticks(sides, [str(side) for side in sides])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("side of the image, pixels")
            axis.set_ylabel("images a second")
            axis.legend(fontsize=7)
        axis.set_title(f"{which}, batch {batch}")
    figure.suptitle(f"{rows[0]['device']}, {rows[0]['dtype']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def crossovers(rows: list[dict[str, Any]]) -> list[str]:
    """Between which sizes of the image one of ours overtakes another's model, or is overtaken, in images a second.

    Between two sizes that were timed, rates are taken for powers of the side.
    """
    rates: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for row in rows:
        group = rates.setdefault((row["pass"], row["batch_size"], row["mode"]), {})
        group.setdefault(row["case"], {})[row["img_size"]] = row["images_per_s"]
    found = []
    for (which, batch, mode), models in rates.items():
        for ours, other in ((a, b) for a in models if _is_ours(a) for b in models if not _is_ours(b)):
            sides = sorted(models[ours].keys() & models[other].keys())
            if len(sides) < 2:
                continue
            leads = [math.log(models[ours][side] / models[other][side]) for side in sides]
            words = [f"{'ahead of' if leads[0] > 0 else 'behind'} {other} at {sides[0]} px"]
            for i in range(1, len(sides)):
                if (leads[i] > 0) != (leads[i - 1] > 0):
                    share = leads[i - 1] / (leads[i - 1] - leads[i])
                    side = sides[i - 1] * (sides[i] / sides[i - 1]) ** share
                    words.append(f"{'overtakes it' if leads[i] > 0 else 'is overtaken'} at {side:.0f} px")
            words.append(f"{math.exp(leads[-1]):.2f} times its rate at {sides[-1]} px")
            found.append(f"{which}, batch {batch}, {mode}: {ours} is {', '.join(words)}")
    return found


def _is_ours(name: str) -> bool:
    return timm.model_entrypoint(name).__module__.startswith("vision_mamba.")


def published_top1(name: str) -> float | None:
    """Per cent of ImageNet-1k at the model's own size, as its authors have it."""
    known = timm.get_pretrained_cfg(name)
    notes = [] if known is None or not known.notes else known.notes
    return next((float(note.split()[1]) for note in notes if note.startswith("top-1 ")), PUBLISHED_TOP1.get(name))


def draw_accuracy(rows: list[dict[str, Any]], path: str) -> None:
    """Published accuracy against images a second, a panel a pass, of models at the size that both are for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def fits(row: dict[str, Any]) -> bool:
        known = timm.get_pretrained_cfg(row["case"])
        return published_top1(row["case"]) is not None and known.input_size[1] == row["img_size"]  # type: ignore

    rows = [row for row in rows if fits(row)]
    kinds = sorted({(row["pass"], row["batch_size"], row["mode"]) for row in rows})
    figure, axes = plt.subplots(1, max(1, len(kinds)), figsize=(6 * max(1, len(kinds)), 4.5), squeeze=False)
    for axis, (which, batch, mode) in zip(axes[0], kinds, strict=False):
        for row in rows:
            if (row["pass"], row["batch_size"], row["mode"]) == (which, batch, mode):
                place = (row["images_per_s"], published_top1(row["case"]))
                axis.plot(*place, "o" if _is_ours(row["case"]) else "s", color="C0" if _is_ours(row["case"]) else "C7")
                axis.annotate(row["case"], place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.set_xscale("log")
        axis.set_xlabel("images a second")
        axis.set_ylabel("ImageNet top-1 as published, %")
        axis.set_title(f"{which}, batch {batch}, {mode}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def cases(chosen: argparse.Namespace) -> Iterator[tuple[str, int, int, str, str]]:
    for name in chosen.models:
        for size in chosen.img_size:
            for batch in chosen.batch_size:
                for which in chosen.passes:
                    for mode in chosen.mode:
                        yield name, size, batch, which, mode


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names or patterns of timm's and ours, such as 'vmamba_tiny*'")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224], help="sides of the image (default: 224)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[128], help="(default: 128)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of autocast (default: bfloat16)")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["eager"], help="(default: eager)")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default", help="(default: default)")
    parser.add_argument("--channels-last", action="store_true", help="for timm's convolutional models")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a figure (default: 2)")
    parser.add_argument("--out", type=destination, help="append the records to this file, one JSON line a figure")
    parser.add_argument("--kernels", type=destination, help="append a list of the kernels of a step to this file")
    parser.add_argument("--csv", type=destination, help="write a table in timm's columns")
    parser.add_argument("--png", type=destination, help="draw images a second")
    parser.add_argument("--accuracy-png", type=destination, help="draw published accuracy against images a second")
    parser.add_argument("--draw", nargs="+", help="time nothing: show and draw these records")
    chosen = parser.parse_args()
    if bool(chosen.models) == bool(chosen.draw):
        parser.error("name models to time, or --draw records")
    names: list[str] = []
    for pattern in chosen.models:
        found = timm.list_models(pattern) if "*" in pattern else [pattern] * timm.is_model(pattern)
        if not found:
            parser.error(f"no model is named {pattern}; timm.list_models('*mamba*') shows ours")
        names += found
    chosen.models = names
    if chosen.compile_mode != "default" and "compile" not in chosen.mode:
        parser.error("--compile-mode is of --mode compile")
    if "graph" in chosen.mode and torch.device(chosen.device).type != "cuda":
        parser.error("--mode graph needs a CUDA device")
    if chosen.kernels and torch.device(chosen.device).type != "cuda":
        parser.error("--kernels needs a CUDA device")
    return chosen


def main() -> int:
    chosen = arguments()
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = True
    source = provenance(chosen.device)
    rows = [json.loads(line) for path in chosen.draw or () for line in Path(path).read_text().splitlines()]
    for case in track(list(cases(chosen)), description="timing", console=console):
        rows.append(source | benchmark(chosen, case))
        console.print(*case, rows[-1].get("error") or f"{rows[-1]['ms'][1]} ms", highlight=False)
        if chosen.out:
            with open(chosen.out, "a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    if chosen.csv:
        write_csv(rows, chosen.csv)
    timed = [row for row in rows if "error" not in row]
    for sentence in crossovers(timed):
        Console(soft_wrap=True).print(sentence, highlight=False)
    if chosen.accuracy_png:
        draw_accuracy(timed, chosen.accuracy_png)
    if chosen.png and timed:
        draw(timed, chosen.png)
    return int(not timed)


if __name__ == "__main__":
    sys.exit(main())
