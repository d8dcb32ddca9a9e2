"""VideoMamba: the published code's results on weights made by rule, its checkpoints, its start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests import parity
from tests.tolerances import LOGITS
from vision_mamba.layers import BiMamba
from vision_mamba.models.videomamba import checkpoint_filter_fn, to_published

CASES = parity.read("videomamba")  # those of all sizes are in fixtures/full, for tools/parity.py
SIZES = {"tiny": 7_148_008, "small": 25_796_584, "middle": 74_217_448, "base": 97_598_440}


@pytest.mark.parametrize("case", CASES, ids=parity.describe)
def test_published_results(case: parity.Case) -> None:
    parity.check(case, to_published, checkpoint_filter_fn)


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_as_many_as_published(size: str) -> None:
    model = timm.create_model(f"videomamba_{size}_patch16_224", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[size]


def mean_for_sum(model: nn.Module) -> None:
    for block in model.blocks:
        block.mixer.scale = 0.5


def class_token_in_the_middle(model: nn.Module) -> None:
    model.class_token = "middle"


def one_a_for_both_ways(model: nn.Module) -> None:
    for block in model.blocks:
        block.mixer.A_log.data[:] = block.mixer.A_log.data[0].clone()


@pytest.mark.parametrize("mistake", [mean_for_sum, class_token_in_the_middle, one_a_for_both_ways])
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[nn.Module], None]) -> None:
    case = parity.find(CASES, "test_videomamba", 160)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    mistake(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_the_fixtures_would_show_another_epsilon() -> None:
    case = parity.find(CASES, "videomamba_tiny_patch16_224", 64, scaled=True)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    for norm in (model.norm, *(block.norm for block in model.blocks)):
        norm.eps = 1e-6
    assert parity.off_by(case, model) > 2 * LOGITS


def test_a_published_file_loads_strictly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = timm.create_model("test_videomamba")
    state = to_published(source.state_dict())
    distillation = {"distill_head.0.weight": torch.ones(48), "distill_head.1.bias": torch.zeros(384)}
    card = dict(file=str(tmp_path / "published.pth"))
    torch.save({"model": state | distillation, "model_ema": None, "epoch": 299}, card["file"])
    with caplog.at_level(logging.INFO, "vision_mamba"):
        model = timm.create_model("test_videomamba", pretrained=True, pretrained_cfg_overlay=card)
    assert "distill_head.0.weight, distill_head.1.bias" in caplog.text
    own, theirs = model.state_dict(), source.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)

    torch.save({"model": state | {"stranger": torch.zeros(1)}}, card["file"])
    with pytest.raises(ValueError, match=r"none missing, 1 \(stranger\) not used"):
        timm.create_model("test_videomamba", pretrained=True, pretrained_cfg_overlay=card)


def test_the_class_token_keeps_its_row_at_other_sizes() -> None:
    source = timm.create_model("test_videomamba")
    other = timm.create_model("test_videomamba", img_size=(96, 128))
    other.load_state_dict(checkpoint_filter_fn(to_published(source.state_dict()), other))
    assert other.pos_embed.shape == (1, 1 + 6 * 8, 48)
    assert torch.equal(other.pos_embed[:, 0], source.pos_embed[:, 0])


@pytest.mark.parametrize("size", SIZES)
def test_released_weights_have_an_address(size: str) -> None:
    card = timm.get_pretrained_cfg(f"videomamba_{size}_patch16_224")
    assert card.hf_hub_id == "OpenGVLab/VideoMamba" and card.license == "apache-2.0"
    assert card.hf_hub_filename == f"videomamba_{size[0]}16_in1k_res224.pth"
    assert card.tag == ("dist_in1k" if size in ("middle", "base") else "in1k")
    with torch.device("meta"), pytest.warns(UserWarning, match=f"videomamba_{size} to current videomamba_{size}_pat"):
        timm.create_model(f"videomamba_{size}")


def test_initialisation_is_the_published_one() -> None:
    model = timm.create_model("test_videomamba", embed_dim=128)
    mixer = model.blocks[1].mixer
    assert isinstance(mixer, BiMamba) and not mixer.dt_bias.any() and not model.cls_token.any()
    for weight in (mixer.in_proj.weight, mixer.x_proj_weight, mixer.dt_weight, model.pos_embed, model.head.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(mixer.out_proj.weight.detach().abs().max()) == pytest.approx((256 * 3) ** -0.5, rel=0.05)
    assert float(model.patch_embed.proj.weight.detach().abs().max()) == pytest.approx(768**-0.5, rel=0.05)
