"""Draw how the time of a scan grows, from records of cases that grow along one axis.

python tools/bench/run.py --case 'grow_*' --device cuda --dtype bfloat16 --out results/cuda_scan.jsonl
python tools/bench/plot.py results/cuda_scan.jsonl --axes tokens states --out docs/scan_growth.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from bench.render import latest  # noqa: E402

LABELS = {"tokens": "tokens L", "states": "states N", "channels": "channels D"}
STYLES = {"fwd": "-", "bwd": "--", "fwdbwd": ":"}


def draw(records: list[dict[str, Any]], axes: list[str], out: Path, passes: Sequence[str] = ("fwd", "bwd")) -> None:
    """One panel an axis, one line an implementation and pass, both scales logarithmic: linear cost has slope 1."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(axes), figsize=(5 * len(axes), 4), squeeze=False, layout="constrained")
    for panel, axis in zip(panels[0], axes, strict=True):
        lines: dict[tuple[str, str], dict[int, float]] = {}
        for record in latest(records):
            if record["case"].startswith(f"grow_{axis}_") and record["pass"] in passes:
                line = lines.setdefault((record["backend"], record["pass"]), {})
                line[record["shape"].get(axis) or record["shape"]["width"]] = record["ms"][1]
        if not lines:
            raise SystemExit(f"plot: no record is of a case grow_{axis}_*; make some with tools/bench/run.py.")
        colours = {name: f"C{i}" for i, name in enumerate(sorted({name for name, _ in lines}))}
        for (name, which), points in sorted(lines.items(), key=lambda line: (passes.index(line[0][1]), line[0][0])):
            sizes = sorted(points)
            style = dict(color=colours[name], linestyle=STYLES[which], marker="o", markersize=3)
            panel.plot(sizes, [points[size] for size in sizes], label=f"{name}, {which}", **style)
        low, high = min(sizes), max(sizes)
        top = max(points[high] for points in lines.values() if high in points)
        panel.plot([low, high], [top * low / high, top], color="0.7", linewidth=1, label="linear")
        panel.set(xscale="log", yscale="log", xlabel=LABELS[axis], ylabel="ms")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7, handlelength=3.5)
    one = next(record for record in records if record["case"].startswith("grow_"))
    figure.suptitle(f"{one['device']}, {one['dtype']}, torch {one['torch']}", fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a file of one JSON line a figure")
    parser.add_argument("--axes", nargs="+", choices=LABELS, default=["tokens", "states"], help="one panel for each")
    parser.add_argument("--passes", nargs="+", choices=STYLES, default=["fwd", "bwd"], help="lines of each panel")
    parser.add_argument("--out", type=Path, required=True, help="the picture, PNG or SVG")
    chosen = parser.parse_args()
    draw([json.loads(line) for line in chosen.file.read_text().splitlines()], chosen.axes, chosen.out, chosen.passes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
