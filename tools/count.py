"""Count parameters and multiply-adds of every registered model, and put them on record with what its cards say.

    python tools/count.py        # writes results/models.jsonl and the table of README.md

MACs are half of the floating-point operations that torch.utils.flop_counter sees in one forward pass of an image of the
nominal size, on the meta device: nothing is computed. What the scans count is in vision_mamba.ops.autograd.scan_flops
and vision_mamba.ops.ssd_operator.flops. The table also shows how far logits and gradients are from the published ones:
that is measured by tools/parity.py, and on record in results/parity.jsonl.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch.utils.flop_counter import FlopCounterMode

import vision_mamba
from vision_mamba.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "models.jsonl"
PARITY = ROOT / "results" / "parity.jsonl"
README = ROOT / "README.md"
COVERED = ("vision_mamba", "tools/count.py")  # what a record depends on
SPEEDS = ROOT / "results" / "families_gpu.jsonl"
END = "<!-- end of table -->\n"
#: Images a second, inferring and training, as published by the authors: on an A100, 128 images of 224 px a step.
PUBLISHED_SPEEDS = {
    "vmamba_tiny_v0": (638, 195),
    "vmamba_base_s1l20": (827, 313),
    "mambavision_tiny": (6298, None),
}


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
    card = timm.get_pretrained_cfg(name)
    scans = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items() if "vision_mamba" in str(op)}
    return {
        "case": name,
        "input": list(size),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
        "scan_flops": sum(scans.values()),
        "license": card and card.license,
        "cards": [_card(name.partition(".")[2], card) for name, card in get_arch_pretrained_cfgs(name).items()],
    }


def _card(tag: str, card: PretrainedCfg) -> dict[str, Any]:
    """What a weight card says: its tag, the published figure, where the weights are if they are anywhere."""
    hub = f"https://huggingface.co/{card.hf_hub_id}" if card.hf_hub_id else None
    return {"tag": tag, "published": list(card.notes or ()), "weights": card.url or hub}


def table(records: Iterable[dict[str, Any]], differences: Mapping[str, tuple[float, float]]) -> str:
    """The records as a table in markdown, families apart and each from small to large."""
    titles = ("model", "parameters, M", "GMACs", "in scans", "input", "published", "weights", "licence", "parity")
    lines = [f"| {' | '.join(titles)} |", "|---|--:|--:|--:|---|---|---|---|---|"]
    for r in sorted(records, key=lambda r: (r["case"].split("_")[0], r["flops"])):
        cells = (
            f"`{r['case']}`",
            f"{r['params'] / 1e6:.1f}",
            f"{r['flops'] / 2e9:.2f}",
            f"{r['scan_flops'] / r['flops']:.0%}",
            " x ".join(map(str, r["input"][1:])),
            ", ".join(note.removeprefix("top-1 ") for card in r["cards"] for note in card["published"]),
            ", ".join(f"[{card['tag']}]({card['weights']})" for card in r["cards"] if card["weights"]),
            r["license"],
            " / ".join(f"{off:.0e}" for off in differences.get(r["case"], ())),
        )
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines) + "\n"


def measured(path: Path = PARITY) -> dict[str, tuple[float, float]]:
    """Model -> relative difference of its logits and of its gradients from the published ones, where measured."""
    return {record["case"]: (record["relative_difference"], record["gradient_difference"]) for record in read(path)}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def speeds(records: Iterable[dict[str, Any]]) -> str:
    """What `tools/benchmark.py` measured of one model of each family, beside what its authors published."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for r in records:
        found.setdefault(r["case"], {})[r["pass"], r["mode"]] = r
    titles = ("model", "inference, images/s", "training, images/s", "its memory, GiB", "published, A100, images/s")
    lines = [f"| {' | '.join(titles)} |", "|---|--:|--:|--:|--:|"]
    for name, runs in sorted(found.items()):
        theirs = [f"{speed:,}" for speed in PUBLISHED_SPEEDS.get(name, ()) if speed]
        ours = (f"{runs[which, 'graph']['images_per_s']:,.0f}" for which in ("infer", "train"))
        cells = (f"`{name}`", *ours, f"{runs['train', 'eager']['peak_gib']:.1f}", " / ".join(theirs) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def put_table(text: str, rows: str, record: Path = RECORD) -> str:
    """A text with the table between the mark of a record and the next end replaced."""
    begin = f"<!-- table of results/{record.name} -->\n"
    return re.sub(f"(?s)(?<={re.escape(begin)}).*?(?={re.escape(END)})", lambda _: rows, text)


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    source = provenance("meta", *COVERED) | {"timm": timm.__version__}
    RECORD.write_text("".join(json.dumps(source | count(name)) + "\n" for name in model_names()))
    text = put_table(README.read_text(), table(read(RECORD), measured()))
    README.write_text(put_table(text, speeds(read(SPEEDS)), SPEEDS))
    sys.stdout.write(f"{RECORD.relative_to(ROOT)} and {README.name} are up to date\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
