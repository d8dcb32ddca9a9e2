"""What a family's published code gives on weights and inputs made by rule, and how ours is held to it.

A fixture is a list of cases, each made once by running the published code on the CPU in float32 with a sequential scan:
the model, its arguments, the shape of the input, factors on some weights (small activations, on which the norms'
epsilon shows), and of the results a few values, evenly spread.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from tests import golden
from tests.tolerances import LOGITS

Case = dict[str, Any]
ToPublished = Callable[[dict[str, Tensor]], dict[str, Tensor]]
FilterFn = Callable[[dict[str, Any], Any], dict[str, Tensor]]


def read(family: str) -> list[Case]:
    return json.loads((Path(__file__).parent / "models" / "fixtures" / f"{family}.json").read_text())


def describe(case: Case) -> str:
    """A name for the case, as pytest's `ids` takes it."""
    words = [case["model"], "x".join(map(str, case["input"])), *case["arguments"]]
    return "-".join(words + ["scaled"] * bool(case["scaled"]))


def find(cases: list[Case], model: str, height: int, scaled: bool = False) -> Case:
    (case,) = (c for c in cases if c["model"] == model and c["input"][2] == height and bool(c["scaled"]) is scaled)
    return case


def spread(tensor: Tensor, count: int) -> Tensor:
    """The values that a fixture keeps of a tensor: `count` of them, evenly spaced."""
    return tensor.detach().flatten()[torch.linspace(0, tensor.numel() - 1, min(count, tensor.numel())).long()]


def error(result: Tensor, expected: list[float]) -> float:
    """Largest difference of the values that were kept, relative to the largest of them."""
    return float((result - torch.tensor(expected)).abs().max()) / max(map(abs, expected))


def prepare(case: Case, to_published: ToPublished, filter_fn: FilterFn, **changed: Any) -> nn.Module:
    """The case's model with its weights, which it got as a published checkpoint."""
    with torch.device("meta"):  # all its weights come from the state dict
        model = timm.create_model(case["model"], **case["arguments"] | changed).eval()
    state = golden.fill_state_dict(to_published(model.state_dict()))
    for name, factor in case["scaled"].items():
        state[name] = state[name] * factor
    assert golden.fingerprint(state) == case["weights"]
    model.load_state_dict(filter_fn({"state_dict": state}, model), assign=True)
    return model


def check(case: Case, to_published: ToPublished, filter_fn: FilterFn) -> None:
    """Hold parameters, logits and gradients to what the published code gave."""
    model = prepare(case, to_published, filter_fn)
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameters"]
    gradients = case.get("gradients", {})
    x = golden.image(*case["input"]).requires_grad_(bool(gradients))
    with torch.set_grad_enabled(bool(gradients)):
        logits = model(x)
    assert error(spread(logits, 32), case["logits"]) <= LOGITS
    assert logits.argmax(1).tolist() == case["argmax"]
    assert float(logits.detach().std()) == pytest.approx(case["std"], rel=LOGITS)
    assert float(logits.detach().sum()) == pytest.approx(case["sum"], abs=LOGITS * float(logits.detach().abs().sum()))
    if gradients:
        (logits * golden.image(*logits.shape)).sum().backward()
        taken: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
        found: dict[str, Any] = {**to_published(taken), "input": x.grad}
        for name, expected in gradients.items():
            assert error(spread(found[name], 8), expected["values"]) <= LOGITS, name
            assert float(found[name].norm()) == pytest.approx(expected["norm"], rel=LOGITS), name


def off_by(case: Case, model: nn.Module) -> float:
    """How far a model's logits are from the case's; over `LOGITS` for any mistake that a fixture is to show."""
    with torch.no_grad():
        return error(spread(model(golden.image(*case["input"])), 32), case["logits"])
