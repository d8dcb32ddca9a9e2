"""Run every model on weights and inputs made by rule, and put on record how far its logits are from the published ones.

    python tools/parity.py                      # writes results/parity.jsonl; minutes, and 4 GB for the largest
    python tools/parity.py --models 'vssd_*'    # those alone, the other records stay as they are

The published logits are the fixtures in tests/models/fixtures, each made once by running the authors' code on a CPU in
float32. A difference is the largest of the logits that a fixture keeps, relative to the largest of these.
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
from vision_mamba.models import vmamba  # noqa: E402
from vision_mamba.provenance import provenance  # noqa: E402

RECORD = ROOT / "results" / "parity.jsonl"
FIXTURES = ROOT / "tests" / "models" / "fixtures"
COVERED = ("vision_mamba/models", "vision_mamba/layers", "vision_mamba/scans", "csrc/cpu", "tests/models/fixtures")


def cases(folder: Path = FIXTURES) -> Iterator[dict[str, Any]]:
    """Every fixture of a model that is not for tests alone, in one form."""
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        found = content if isinstance(content, list) else content.get("cases", [content])
        yield from (case for case in found if not case["model"].startswith("test_"))


def shape(case: dict[str, Any]) -> list[int]:
    """Of the images that the case's logits are for."""
    return case["input"] if "input" in case else case["image"]


def difference(case: dict[str, Any]) -> float:
    """How far the logits of our model are from those of the case."""
    with torch.device("meta"):  # all its weights come from the state dict
        model = timm.create_model(case["model"], **case["arguments"]).eval()
    family = vmamba if isinstance(model, vmamba.VMamba) else sys.modules[type(model).__module__]
    if case["model"].startswith("efficientvmamba"):
        family = sys.modules[timm.model_entrypoint(case["model"]).__module__]
    state = golden.fill_state_dict(family.to_published(model.state_dict()))
    state = {name: tensor * case["scaled"].get(name, 1.0) for name, tensor in state.items()}
    model.load_state_dict(family.checkpoint_filter_fn({"state_dict": state}, model), assign=True)
    with torch.no_grad():
        logits = model(golden.image(*shape(case)))
    return _error(logits, case["logits"])


def _error(logits: Tensor, kept: Any) -> float:
    if isinstance(kept, list):
        return parity.error(parity.spread(logits, 32), kept)
    expected = torch.tensor(kept["values"])
    return float((logits[:, kept["classes"]] - expected).abs().max() / expected.abs().max())


def measure(names: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Model -> record, of all fixtures of each."""
    found: dict[str, dict[str, Any]] = {}
    for case in cases():
        name = case["model"]
        if names(name):
            record = found.setdefault(
                name, provenance("cpu", *COVERED) | {"timm": timm.__version__, "case": name, "inputs": {}}
            )
            size = "x".join(map(str, shape(case)))
            off = difference(case)
            record["inputs"][size] = max(off, record["inputs"].get(size, 0.0))
            record["relative_difference"] = max(record["inputs"].values())
            sys.stdout.write(f"{name} {size} {off:.1e}\n")
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
    pattern = parser.parse_args().models
    records = read() | measure(lambda name: fnmatch.fnmatch(name, pattern))
    RECORD.write_text("".join(json.dumps(records[name]) + "\n" for name in sorted(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
