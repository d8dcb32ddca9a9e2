"""Count parameters and multiply-adds of every registered model, and put them on record with what its cards say.

    python tools/count.py        # writes results/models.jsonl and the tables of README.md

MACs are half of the floating-point operations that torch.utils.flop_counter sees in one forward pass of an image of the
nominal size, on the meta device: nothing is computed. What the scans count is in vision_mamba.ops.autograd.scan_flops
and vision_mamba.ops.ssd_operator.flops; tools/macs.py counts as each family's authors do, beside what they publish. The
table also shows how far logits and gradients are from the published ones: that is measured by tools/parity.py, and on
record in results/parity.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs
from torch.utils.flop_counter import FlopCounterMode

import vision_mamba
from vision_mamba.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import macs  # noqa: E402
import tables  # noqa: E402

RECORD = ROOT / "results" / "models.jsonl"
COVERED = ("vision_mamba", "tools/count.py", "tools/macs.py")  # what a record depends on


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
    theirs = round(macs.as_published(name, model, *size), 3) if name in macs.PUBLISHED else None
    return {
        "case": name,
        "input": list(size),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "flops": counter.get_total_flops(),
        "scan_flops": sum(scans.values()),
        "gmacs_as_published": theirs,
        "published_gmacs": macs.PUBLISHED.get(name),
        "license": card and card.license,
        "cards": [_card(name.partition(".")[2], card) for name, card in get_arch_pretrained_cfgs(name).items()],
    }


def _card(tag: str, card: PretrainedCfg) -> dict[str, Any]:
    """What a weight card says: its tag, the published figure, where the weights are if they are anywhere."""
    hub = f"https://huggingface.co/{card.hf_hub_id}" if card.hf_hub_id else None
    return {"tag": tag, "published": list(card.notes or ()), "weights": card.url or hub}


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args()
    source = provenance("meta", *COVERED) | {"timm": timm.__version__}
    RECORD.write_text("".join(json.dumps(source | count(name)) + "\n" for name in model_names()))
    sys.stdout.write(f"{RECORD.relative_to(ROOT)} is up to date\n")
    return tables.main([])


if __name__ == "__main__":
    sys.exit(main())
