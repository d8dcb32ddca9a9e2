"""Run every model on weights and inputs made by rule, and put on record how far it is from the published code.

    python tools/parity.py                      # writes results/parity.jsonl; half an hour, and 10 GB for the largest
    python tools/parity.py --models 'vssd_*'    # those alone, the other records stay as they are
    python tools/parity.py --device cuda --out parity_gpu.jsonl

What the published code gave are the fixtures in tests/models/fixtures/full, each made once by running the authors' code
on a CPU in float32: every model whole, at the size it is for and on an image that is not square, where their code takes
any. A difference is the largest of the values that a fixture keeps, of the logits or of a gradient, relative to the
largest of these; the gradients are of the sum of logits by fixed weights, with respect to the image and to parameters.
Families with rectifiers have them in float64, on either side: where an input is near zero, rounding decides on a slope;
so have those on Mamba-2's scan, where terms cancel, and VideoMamba-B at 224 pixels, where the values kept of one
gradient are far below its largest, near what float32 rounds off that.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)  # for the fixtures' reader, which the tests have too

from tests import golden, parity  # noqa: E402
from tests.registered import family  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402

RECORD = ROOT / "results" / "parity.jsonl"
FIXTURES = ROOT / "tests" / "models" / "fixtures" / "full"
COVERED = ("vision_mamba/models", "vision_mamba/layers", "vision_mamba/scans", "csrc", "tests/models/fixtures/full")


def cases() -> Iterator[dict[str, Any]]:
    """What the published code gave, model by model."""
    for path in sorted(FIXTURES.glob("*.json")):
        yield from json.loads(path.read_text())


def size(case: dict[str, Any]) -> str:
    """Of the images that a case is for."""
    return "x".join(map(str, case["input"]))


def differences(case: dict[str, Any], device: str = "cpu") -> dict[str, float]:
    """How far the logits of our model are from those of the case, and its gradients, the worst of them."""
    with torch.device("meta"):  # all its weights come from the state dict
        model = timm.create_model(case["model"], **case["arguments"]).eval()
    if sum(parameter.numel() for parameter in model.parameters()) != case["parameters"]:
        raise ValueError(f"{case['model']} has not the {case['parameters']} parameters of the published model.")
    published = family(case["model"])
    state = golden.fill_state_dict(published.to_published(model.state_dict()))
    state = {name: tensor * case["scaled"].get(name, 1.0) for name, tensor in state.items()}
    model.load_state_dict(published.checkpoint_filter_fn({"state_dict": state}, model), assign=True)
    del state
    model = model.to(device)
    for name, parameter in model.named_parameters():  # gradients of the rest would take as much room as the model
        parameter.requires_grad_(bool(published.to_published({name: parameter}).keys() & case["gradients"].keys()))
    images = golden.image(*case["input"]).to(device)
    wide = case["gradient_type"] == "float64"
    if wide:
        with torch.no_grad():
            logits = model(images)
        model, images = model.double(), images.double()
    images.requires_grad_()
    outputs = model(images)
    (outputs * golden.image(*outputs.shape).to(outputs)).sum().backward()
    logits = logits if wide else outputs
    found = published.to_published(
        {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    )
    found["input"] = images.grad
    return {
        "logits": parity.error(parity.spread(logits, 32).cpu().float(), case["logits"]),
        "gradients": max(_of_gradient(found[name], wanted) for name, wanted in case["gradients"].items()),
    }


def _of_gradient(found: Tensor, wanted: dict[str, Any]) -> float:
    """The difference of the values that are kept, or that of the norm if it is larger."""
    return max(
        parity.error(parity.spread(found, 8).cpu().float(), wanted["values"]),
        abs(float(found.norm()) / wanted["norm"] - 1),
    )


def measure(names: Callable[[str], bool], device: str) -> dict[str, dict[str, Any]]:
    """Model -> record, of all fixtures of each."""
    found: dict[str, dict[str, Any]] = {}
    source = provenance(device, *COVERED) | {"timm": timm.__version__}
    for case in cases():
        name = case["model"]
        if names(name):
            record = found.setdefault(name, source | {"case": name, "inputs": {}})
            record["inputs"][size(case)] = off = differences(case, device)
            for key, part in (("relative_difference", "logits"), ("gradient_difference", "gradients")):
                record[key] = max(record.get(key, 0.0), off[part])
            sys.stdout.write(f"{name} {size(case)} logits {off['logits']:.1e} gradients {off['gradients']:.1e}\n")
            sys.stdout.flush()
    return found


def read(path: Path = RECORD) -> dict[str, dict[str, Any]]:
    """Model -> record, as last written."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return {record["case"]: record for record in map(json.loads, lines)}


def main() -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--models", default="*", help="pattern of model names (default: every model)")
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument("--out", type=Path, default=RECORD, help="file of the records (default: results/parity.jsonl)")
    chosen = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    records = read(chosen.out) | measure(lambda name: fnmatch.fnmatch(name, chosen.models), chosen.device)
    chosen.out.write_text("".join(json.dumps(records[name]) + "\n" for name in sorted(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
