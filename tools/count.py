"""Count parameters and multiply-adds of every registered model, and put them on record.

    python tools/count.py        # writes results/models.jsonl and the table of README.md

MACs are half of the floating-point operations that torch.utils.flop_counter sees in one forward pass of an image of the
nominal size, on the meta device: nothing is computed. What the scan counts is in vision_mamba.ops.autograd.scan_flops.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import vision_mamba
from vision_mamba.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "models.jsonl"
README = ROOT / "README.md"
BEGIN, END = "<!-- table of results/models.jsonl -->\n", "<!-- end of table -->\n"


def model_names() -> list[str]:
    """Ours, without those that are for tests."""
    ours = f"{vision_mamba.__name__}."
    names = timm.list_models(exclude_filters="test_*", include_tags=False)
    return [name for name in names if timm.model_entrypoint(name).__module__.startswith(ours)]


def count(name: str) -> dict[str, Any]:
    """Input size, parameters and forward FLOPs of a model, those of its scans apart."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = timm.create_model(name).eval()
        size = timm.data.resolve_data_config(model=model)["input_size"]
        model(torch.empty(1, *size))
    scans = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items() if "selective_scan" in str(op)}
    return {
        "case": name,
        "input": list(size),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
        "scan_flops": sum(scans.values()),
    }


def table(records: Iterable[dict[str, Any]]) -> str:
    """The records as a table in markdown, families apart and each from small to large."""
    lines = ["| model | parameters, M | GMACs | of these in scans | input |", "|---|--:|--:|--:|---|"]
    for r in sorted(records, key=lambda r: (r["case"].split("_")[0], r["flops"])):
        share = f"{r['scan_flops'] / r['flops']:.0%}"
        size = " x ".join(map(str, r["input"][1:]))
        lines.append(f"| `{r['case']}` | {r['params'] / 1e6:.1f} | {r['flops'] / 2e9:.2f} | {share} | {size} |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def put_table(text: str, rows: str) -> str:
    """A text with the table between its two marks replaced."""
    return re.sub(f"(?s)(?<={re.escape(BEGIN)}).*(?={re.escape(END)})", lambda _: rows, text)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    source = provenance("meta") | {"timm": timm.__version__}
    RECORD.write_text("".join(json.dumps(source | count(name)) + "\n" for name in model_names()))
    README.write_text(put_table(README.read_text(), table(read(RECORD))))
    sys.stdout.write(f"{RECORD.relative_to(ROOT)} and {README.name} are up to date\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
