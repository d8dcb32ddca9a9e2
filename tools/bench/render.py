"""Turn records of measurements into a table in Markdown.

    python tools/bench/render.py results/cpu_scan.jsonl

One row for each case and implementation, one column for each pass: the median, the 20th and 80th percentiles, of ours
on a GPU the share of the floor's speed (bytes at the rate of a copy, exponentials at the rate of the units that make
them), of others how many times longer they take than the fastest of ours. Of several records of one figure the last
counts. Peak memory stands beside the size of the inputs. Where one axis alone grows from case to case
(`grow_<axis>_<size>`), the exponent with which time grows along it follows: 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = ("cpu", "cuda", "triton", "eager", "reference")

Record = dict[str, Any]


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each figure, in the order in which figures first came."""
    keys = ("device", "threads", "level", "lean", "dtype", "case", "backend", "pass")
    return list({tuple(record.get(key) for key in keys): record for record in records}.values())


def table(records: Iterable[Record]) -> str:
    """The records in Markdown, one table for each machine and type."""
    machines: dict[str, list[Record]] = {}
    for r in latest(records):
        threads = f", {r['threads']} threads" if "threads" in r else ""
        title = f"{r['device']}{threads}, {r['dtype']}, torch {r['torch']}; milliseconds: p50 (p20 to p80)"
        machines.setdefault(title, []).append(r)
    return "\n".join(_machine(title, found) for title, found in machines.items())


def _machine(title: str, records: list[Record]) -> str:
    passes = list(dict.fromkeys(record["pass"] for record in records))
    rows = dict.fromkeys((record["case"], record["backend"]) for record in records)
    found = {(record["case"], record["backend"], record["pass"]): record for record in records}
    head = ["case", "implementation", *passes, "peak MiB", "rel. RMS error"]
    lines = [title, "", "| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(passes) + 2)]
    for case, backend in rows:
        mine = [found.get((case, backend, which)) for which in passes]
        last = [record for record in mine if record][-1]
        cells = [_cell(record, found) if record else "" for record in mine]
        peak = str(last["peak_mib"])
        if "inputs_mib" in last:
            peak += f" of {last['pass']}, inputs {last['inputs_mib']}"
        lines.append("| " + " | ".join([case, backend, *cells, peak, f"{last['rel_rms']:.1e}"]) + " |")
    return "\n".join([*lines, *growth(records)]) + "\n"


def growth(records: Iterable[Record]) -> list[str]:
    """For every axis that grows alone: the slope of log time over log size, by least squares."""
    series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for record in records:
        kind, _, rest = record["case"].partition("_")
        if kind == "grow":
            axis, _, size = rest.rpartition("_")
            point = (math.log(int(size)), math.log(record["ms"][1]))
            series.setdefault((axis, record["backend"], record["pass"]), []).append(point)
    return [
        f"\ntime over {axis} from {math.exp(points[0][0]):.0f} to {math.exp(points[-1][0]):.0f}, {backend}, {which}: "
        f"exponent {statistics.linear_regression(*zip(*points, strict=True)).slope:.2f}"
        for (axis, backend, which), points in series.items()
        if len(points) > 1
    ]


def _cell(record: Record, found: dict[tuple[str, str, str], Record]) -> str:
    low, middle, high = record["ms"]
    cell = f"{middle:.4g} ({low:.4g} to {high:.4g})"
    if record["backend"] in OURS:
        floor = record.get("floor_ms")
        return f"{cell}, {max(floor.values()) / middle:.0%} of the floor's speed" if floor else cell
    ours = [found[key]["ms"][1] for b in OURS if (key := (record["case"], b, record["pass"])) in found]
    return f"{cell}, {middle / min(ours):.0f}x" if ours else cell


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="files of one JSON line a figure")
    lines = [line for path in parser.parse_args().files for line in path.read_text().splitlines()]
    sys.stdout.write(table(map(json.loads, lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
