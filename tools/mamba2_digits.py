"""Mamba-2 without a first token, on digits, trained in bfloat16: does it stay stable, and what does it learn?

    python tools/mamba2_digits.py                  # minutes on a CPU; results/mamba2_digits.jsonl
    python tools/mamba2_digits.py --device cuda --precisions bfloat16 float32

Two mixers in residual blocks read the 64 pixels of an 8 x 8 digit (scikit-learn's, 1,797 of them, a quarter held out)
as a sequence; their mean is classified. Five hundred steps of AdamW under bfloat16 autocast, all else at its default.
A line of the record is one direction: losses on the way, the largest norm of a gradient, and how many digits are right.
In float32 the same model sees the same batches, to compare with.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from ssm_digits import Data, load  # noqa: E402

from vision_mamba.layers import Mamba2, MixerStack, SequenceClassifier  # noqa: E402
from vision_mamba.ops.ssd import DIRECTIONS  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402

RECORD = ROOT / "results" / "mamba2_digits.jsonl"
SETTING: dict[str, Any] = dict(dim=32, d_state=16, headdim=16, depth=2, batch=32, lr=3e-3, weight_decay=0.05)

log = logging.getLogger("mamba2_digits")


def build(direction: str) -> SequenceClassifier:
    mixer = partial(Mamba2, d_state=SETTING["d_state"], headdim=SETTING["headdim"], direction=direction)
    return SequenceClassifier(
        nn.Linear(1, SETTING["dim"]), MixerStack(SETTING["dim"], SETTING["depth"], mixer), 10, "avg"
    )


def train(direction: str, half: bool, steps: int, device: torch.device, data: Data) -> dict[str, Any]:
    """Train one model, in bfloat16 if asked; what came of it."""
    torch.manual_seed(0)
    images, test_images, labels, test_labels = (part.to(device) for part in data)
    model = build(direction).to(device)
    # Pixels alone do not say where they are, and without an order nothing else does.
    place = torch.linspace(-1, 1, images.shape[1], device=device).view(1, -1, 1)
    model.embed = nn.Linear(2, SETTING["dim"], device=device)
    images, test_images = (torch.cat((part, place.expand_as(part)), -1) for part in (images, test_images))
    optimizer = torch.optim.AdamW(model.parameters(), SETTING["lr"], weight_decay=SETTING["weight_decay"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    largest = 0.0
    for step in range(steps):
        chosen = torch.randint(len(images), (SETTING["batch"],)).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            loss = F.cross_entropy(model(images[chosen]).float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + norm):
            raise ArithmeticError(f"{direction}: loss {losses[-1]}, norm of the gradient {norm} at step {step}")
        largest = max(largest, norm)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
        right = (model(test_images).argmax(1) == test_labels).float().mean().item()
    every = max(1, steps // 10)
    return {
        "dtype": "bfloat16 autocast" if half else "float32",
        "direction": direction,
        "steps": steps,
        "losses": [round(sum(losses[i : i + every]) / len(losses[i : i + every]), 4) for i in range(0, steps, every)],
        "largest_gradient": round(largest, 2),
        "accuracy": round(right, 4),
    }


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=["both", "none"])
    parser.add_argument("--precisions", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RECORD)
    chosen = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    device, data = torch.device(chosen.device), load()
    torch.set_num_threads(1)  # threads cost more than they bring to models this small
    common = provenance(device) | {"case": "mamba2_digits", "setting": SETTING}
    records = []
    for direction, precision in itertools.product(chosen.directions, chosen.precisions):
        found = train(direction, precision == "bfloat16", chosen.steps, device, data)
        records.append(common | found)
        log.info("%s, %s: losses %s, %.1f%% right", direction, precision, found["losses"], 100 * found["accuracy"])
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text("".join(json.dumps(record) + "\n" for record in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
