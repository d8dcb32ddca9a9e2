"""EfficientVMamba: the published code's results on weights made by rule, its checkpoints, its start."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tests import parity
from tests.tolerances import LOGITS
from vision_mamba.layers import SS2D, efficient, local
from vision_mamba.models.efficientvmamba import checkpoint_filter_fn, to_published

CASES = parity.read("efficientvmamba")  # those of all sizes are in fixtures/full, for tools/parity.py

PARAMETERS = {
    "efficientvmamba_tiny": 6_493_660,
    "efficientvmamba_small": 11_273_688,
    "efficientvmamba_base": 33_717_136,
}


@pytest.mark.parametrize("case", CASES, ids=parity.describe)
def test_published_results(case: parity.Case) -> None:
    parity.check(case, to_published, checkpoint_filter_fn)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


# Mistakes that the fixtures must show: maps of 15 x 23 and of 8 x 12, so steps beyond the edge at the finer one.


def every(model: nn.Module, kind: type[nn.Module]) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


def another_order(model: nn.Module) -> None:
    for mixer in every(model, SS2D):
        mixer.scan.order = "cross"


def attention_to_one_branch(model: nn.Module) -> None:
    for mixer in every(model, efficient.ScanBesideConv):
        mixer.attn.weigh = lambda y, usual=mixer.attn.weigh: y[:, :, 0] + usual(y[:, :, 1:])


def batch_statistics(model: nn.Module) -> None:
    for norm in every(model, nn.BatchNorm2d):
        norm.reset_running_stats()


def another_epsilon(model: nn.Module) -> None:
    for norm in every(model, nn.LayerNorm):
        norm.eps = 1e-6


@pytest.mark.parametrize("mistake", [another_order, attention_to_one_branch, batch_statistics])
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[nn.Module], None]) -> None:
    case = parity.find(CASES, "efficientvmamba_tiny", 60)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    mistake(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_the_fixtures_would_show_another_epsilon() -> None:
    case = parity.find(CASES, "test_efficientvmamba", 70, scaled=True)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    another_epsilon(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def padding_last(table: Tensor) -> Tensor:
    return table.gather(1, torch.sort((table < 0).int(), dim=1, stable=True).indices)


def test_tokens_beyond_the_edge_are_steps() -> None:
    """They drive nothing, but the state decays while they pass: what comes behind them in a route shows it."""
    case = parity.find(CASES, "efficientvmamba_tiny", 60)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    for mixer in every(model, SS2D):
        mixer.scan.table = lambda *grid, table=mixer.scan.table: padding_last(table(*grid))
    assert parity.off_by(case, model) > 2 * LOGITS


def test_a_published_file_loads_strictly(tmp_path: Path) -> None:
    """Averaged weights of a distributed run: names wrapped twice."""
    source = timm.create_model("test_efficientvmamba")
    state = {f"module.module.{name}": tensor for name, tensor in to_published(source.state_dict()).items()}
    card = dict(file=str(tmp_path / "published.ckpt"))
    torch.save({"state_dict": state, "epoch": 290}, card["file"])
    model = timm.create_model("test_efficientvmamba", pretrained=True, pretrained_cfg_overlay=card)
    own, theirs = model.state_dict(), source.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)

    del state["module.module.layers.2.3.norm.bias"]
    torch.save({"state_dict": state | {"stranger": torch.zeros(1)}}, card["file"])
    with pytest.raises(ValueError, match=r"\(stages\.3\.downsample\.pre_norm\.bias\) missing, 1 \(stranger\) not used"):
        timm.create_model("test_efficientvmamba", pretrained=True, pretrained_cfg_overlay=card)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_released_weights_have_an_address(size: str) -> None:
    card = timm.get_pretrained_cfg(f"efficientvmamba_{size}")
    assert card.tag == "in1k" and card.hf_hub_id == f"TerryPei/EfficientVMamba-{size.title()}"
    assert card.hf_hub_filename == f"efficient_vmamba_{size}.ckpt" and card.license == "apache-2.0"
    with torch.device("meta"), pytest.warns(UserWarning, match=f"vssm_efficient_{size} to current efficientvmamba_"):
        timm.create_model(f"vssm_efficient_{size}")


def test_initialisation_is_the_published_one() -> None:
    model = timm.create_model("test_efficientvmamba", dims=(64, 64, 64, 64))
    mixer, coarse = model.stages[0].blocks[0].ss2d, model.stages[2].blocks[0].conv
    assert torch.equal(mixer.scan.Ds, torch.ones(4 * 128))
    for linear in (mixer.attn.channel_select, mixer.scan.out_proj):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not mixer.attn.channel_select.bias.any()
    for conv, fan in ((mixer.conv[0], 9), (mixer.conv[3], 64), (coarse.conv_pw, 64), (coarse.se.conv_reduce, 256)):
        assert float(conv.weight.detach().abs().max()) == pytest.approx(fan**-0.5, rel=0.05)
    assert torch.equal(coarse.bn3.weight, torch.ones(64))


def test_drop_path_grows_through_both_kinds_of_blocks() -> None:
    model = timm.create_model("efficientvmamba_tiny", drop_path_rate=0.9, device="meta")
    rates = [
        getattr(block, "drop_path1", None) or block.conv.drop_path for stage in model.stages for block in stage.blocks
    ]
    assert [getattr(rate, "drop_prob", 0.0) for rate in rates] == pytest.approx([0.1 * i for i in range(10)])


def test_the_examples_run() -> None:
    for module in (efficient, local):
        tested = doctest.testmod(module)
        assert tested.attempted and not tested.failed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(block="dual"), "VMamba: block must be one of scan, efficient, inverted; got 'dual'"),
        (dict(block=("scan", "inverted")), "block must be one name or one for each of the 4 stages"),
    ],
)
def test_impossible_blocks_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_vmamba", **arguments)
