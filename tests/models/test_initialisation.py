"""The start of every family's parameters is drawn as the published code draws it.

The fixture holds, of each parameter of a small model, pooled over its blocks, what four draws by the published code
were like: mean, standard deviation, least and largest value and the deciles between; or one value, where all are alike.
"""

from __future__ import annotations

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vision_mamba.models import efficientvmamba, vim

CASES = json.loads((Path(__file__).parent / "fixtures" / "start" / "published.json").read_text())
SIGMAS = 6.0  # of a sample's mean or share, beyond which chance is no excuse


def pooled(model: nn.Module, family: str) -> dict[str, Tensor]:
    """The values of each published parameter, those of all blocks of a stage together."""
    module = efficientvmamba if family == "efficientvmamba" else sys.modules[type(model).__module__]
    rename = module.to_published
    if module is vim:
        rename = partial(vim.to_published, names=partial(vim.published_names, class_token=model.class_token))
    plain = hasattr(model, "patch_embed")
    found: dict[str, list[Tensor]] = {}
    for name, tensor in rename(model.state_dict()).items():
        name = re.sub(r"(^|\.)(layers|blocks)\.\d+\." if plain else r"(\.)(blocks)\.\d+\.", r"\1\2.*.", name)
        name = re.sub(r"(conv1d|x_proj|dt_proj|A_log|D)_\d", r"\1_*", name)
        found.setdefault(name, []).append(tensor.double().flatten())
    return {name: torch.cat(parts) for name, parts in found.items() if "num_batches" not in name}


def differences(values: Tensor, wanted: dict[str, Any]) -> list[str]:
    """In what a sample differs from the distribution that the fixture describes."""
    count = values.numel()
    if count != wanted["count"]:
        return [f"{count} values, not {wanted['count']}"]
    if "value" in wanted:
        return (
            []
            if torch.allclose(values, values.new_tensor(wanted["value"]), rtol=1e-5, atol=0)
            else [f"not all {wanted['value']}"]
        )
    found = []
    mean, std, deciles = float(values.mean()), float(values.std(correction=0)), torch.tensor(wanted["deciles"]).double()
    if abs(mean - wanted["mean"]) > SIGMAS * 1.2 * wanted["std"] / count**0.5:  # 1.2: the fixture is a sample too
        found.append(f"mean {mean:.3g}, not {wanted['mean']:.3g}")
    if abs(std / wanted["std"] - 1) > SIGMAS / count**0.5:
        found.append(f"std {std:.3g}, not {wanted['std']:.3g}")
    for share, decile in zip(torch.linspace(0.1, 0.9, 9).tolist(), deciles[1:-1].tolist(), strict=True):
        slack = 1.2 * SIGMAS * (share * (1 - share) / count) ** 0.5 + 1 / count
        margin = 1e-4 * abs(decile) + 1e-9  # many values can be alike
        below, upto = (float((values <= decile + side).double().mean()) for side in (-margin, margin))
        if not below - slack <= share <= upto + slack:
            found.append(f"{upto:.0%} below {decile:.3g}, not {share:.0%}")
    span = float(deciles[-1] - deciles[0])
    if count > 500 and abs(float(values.max() - values.min()) / span - 1) > 0.5:
        found.append(f"from {float(values.min()):.3g} to {float(values.max()):.3g}, not {wanted['deciles'][::10]}")
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["family"])
def test_every_parameter_starts_as_published(case: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = timm.create_model(case["model"], **case["arguments"])
    found = pooled(model, case["family"])
    assert found.keys() == case["parameters"].keys()
    off = {name: differences(values, case["parameters"][name]) for name, values in found.items()}
    assert {name: what for name, what in off.items() if what} == {}


def test_another_start_would_show() -> None:
    (case,) = (c for c in CASES if c["family"] == "vim")
    torch.manual_seed(3)
    model = timm.create_model(case["model"], **case["arguments"])
    with torch.no_grad():
        model.pos_embed.uniform_(-0.035, 0.035)  # the same mean and spread
        model.blocks[0].mixer.in_proj.weight *= 1.2
        model.norm.weight[0] = 1.01
    found = pooled(model, "vim")
    off = {name for name, values in found.items() if differences(values, case["parameters"][name])}
    assert off == {"pos_embed", "layers.*.mixer.in_proj.weight", "norm_f.weight"}
