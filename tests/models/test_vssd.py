"""VSSD: the published code's results on weights made by rule, its mixer as an equation, its weights' cards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests import parity
from tests.tolerances import LOGITS
from vision_mamba.layers.noncausal import MapAttention, NonCausalSSD
from vision_mamba.models.vssd import VSSD, checkpoint_filter_fn, to_published

#: Parameters as published.
PARAMETERS = {
    "vssd_micro": 13_512_964,
    "vssd_tiny": 24_270_724,
    "vssd_small": 40_075_650,
    "vssd_base": 88_823_151,
}
CASES = parity.read("vssd")
QUICK = [case for case in CASES if case["parameters"] < 2e7]  # tools/parity.py runs them all


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("case", QUICK, ids=parity.describe)
def test_published_results(case: parity.Case) -> None:
    parity.check(case, to_published, checkpoint_filter_fn)


def mixers(model: VSSD) -> list[NonCausalSSD]:
    return [module for module in model.modules() if isinstance(module, NonCausalSSD)]


def skip_twice(model: VSSD) -> None:
    for mixer in mixers(model):
        mixer.D.data *= 2


def swap_b_and_c(model: VSSD) -> None:
    for mixer in mixers(model):
        n, start = mixer.parts[1], 2 * mixer.parts[0]
        for tensor, first in ((mixer.in_proj.weight, start), (mixer.conv2d.weight, start // 2)):
            b, c = tensor.data[first : first + n].clone(), tensor.data[first + n : first + 2 * n].clone()
            tensor.data[first : first + n], tensor.data[first + n : first + 2 * n] = c, b


def finer_epsilon(model: VSSD) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def gate_by_silu(model: VSSD) -> None:
    for mixer in mixers(model):
        inner = mixer.parts[0]
        mixer.in_proj.register_forward_hook(
            lambda _, __, out, inner=inner: torch.cat((F.silu(out[..., :inner]), out[..., inner:]), -1)
        )


@pytest.mark.parametrize("mistake", [skip_twice, swap_b_and_c, gate_by_silu])
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[VSSD], None]) -> None:
    case = CASES[0]
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    mistake(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_the_fixtures_would_show_a_finer_epsilon() -> None:
    case = parity.find(CASES, "vssd_micro", 224, scaled=True)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    finer_epsilon(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_every_token_reads_what_all_have_written() -> None:
    mixer = NonCausalSSD(6, num_heads=3, d_state=5).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    u = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    z, mixed, dt = mixer.in_proj(u).split([12, 22, 3], -1)
    mixed = F.silu(mixer.conv2d(mixed.permute(0, 3, 1, 2))).flatten(2)
    x, B, C = mixed.split([12, 5, 5], 1)
    weight = (F.softplus(dt + mixer.dt_bias) * mixer.A_log.exp()).flatten(1, 2)
    heads = x.unflatten(1, (3, 4))
    state = torch.einsum("bth,bhpt,bnt->bhpn", weight, heads, B)
    y = torch.einsum("bhpn,bnt->bthp", state, C) + torch.einsum("h,bhpt->bthp", mixer.D, heads)
    expected = mixer.out_proj(mixer.norm(y.flatten(2)).unflatten(1, (3, 4)) * z)
    torch.testing.assert_close(mixer(u), expected)


def test_the_last_stage_attends() -> None:
    stages = timm.create_model("test_vssd").stages
    kinds = [{type(block.mixer) for block in stage.blocks} for stage in stages]
    assert kinds == [{NonCausalSSD}, {NonCausalSSD}, {NonCausalSSD}, {MapAttention}]


def test_initialisation_is_the_published_one() -> None:
    model = timm.create_model("test_vssd", dims=(64,) * 4, num_heads=(64, 64, 64, 4))
    model.init_weights()
    mixer = model.stages[2].blocks[1].mixer
    assert mixer.A_log.min() >= 0 and 2.5 < mixer.A_log.max() <= torch.tensor(16.0).log()
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 < dt.min() < 3e-3 and 3e-2 < dt.max() < 0.1001
    assert torch.equal(mixer.D, torch.ones(64))
    for linear in (mixer.in_proj, model.stages[3].blocks[0].mixer.attn.qkv, model.stages[0].blocks[0].mlp.fc1):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    bound = 64**-0.5
    assert 0.9 * bound < model.stages[1].downsample.expand.weight.detach().abs().max() <= bound
    assert not model.head.fc.bias.any()


def test_its_cards_say_where_the_weights_are() -> None:
    for name in PARAMETERS:
        card = timm.get_pretrained_cfg(name)
        assert card.hf_hub_id == "YuhengSSS/VSSD" and card.hf_hub_filename.startswith(name)
        assert card.license == "unspecified" and card.notes[0].startswith("top-1 8")
    assert timm.get_pretrained_cfg("vssd_base.mesa_in1k").notes == ("top-1 85.4",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(depths=(1, 2)), "must name as many stages, got 4, 2, 4 and 4"),
        (dict(num_heads=(5, 2, 2, 3)), "num_heads must divide the 32 inner channels, got 5"),
        (dict(d_conv=2), "d_conv must be odd, got 2"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_vssd", **arguments)
