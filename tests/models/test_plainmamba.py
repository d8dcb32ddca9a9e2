"""PlainMamba: the published code's results on weights made by rule, on maps of other sizes too, and what it repeats."""

from __future__ import annotations

import doctest
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests import parity
from tests.tolerances import LOGITS
from vision_mamba import scans
from vision_mamba.layers import plain
from vision_mamba.layers.plain import PlainMixer
from vision_mamba.models import plainmamba
from vision_mamba.models.plainmamba import checkpoint_filter_fn, to_published
from vision_mamba.ops import selective_scan

CASES = parity.read("plainmamba")  # those of all sizes are in fixtures/full, for tools/parity.py

#: Those published leave the classifier out.
PARAMETERS = {"plainmamba_l1": 7_551_656, "plainmamba_l2": 26_145_832, "plainmamba_l3": 50_956_456}


@pytest.mark.parametrize("case", CASES, ids=parity.describe)
def test_published_results(case: parity.Case) -> None:
    parity.check(case, to_published, checkpoint_filter_fn)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    model = timm.create_model(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


# Mistakes that the fixtures must show, on a map of 7 x 5.


def mixers(model: nn.Module) -> list[PlainMixer]:
    return [module for module in model.modules() if isinstance(module, PlainMixer)]


def moves_forgotten(model: nn.Module) -> None:
    for mixer in mixers(model):
        mixer.move_B.data.zero_()


def left_for_right(model: nn.Module) -> None:
    for mixer in mixers(model):
        mixer.move_B.data = mixer.move_B.data[[0, 2, 1, 3, 4]]


def bias_once(model: nn.Module) -> None:
    for mixer in mixers(model):
        mixer.dt_bias.data /= 2


def steps_driven_by_their_token(model: nn.Module) -> None:
    for mixer in mixers(model):

        def visits(*grid: Any, usual: Callable[..., Tensor] = mixer.scan.visits) -> Tensor:
            steps, moves = usual(*grid)
            return torch.stack((torch.arange(steps.shape[1]).expand_as(steps), moves))

        mixer.scan.visits = visits  # type: ignore[method-assign]


def no_convolution_behind(model: nn.Module) -> None:
    model.blocks[0].conv = None


def another_epsilon_at_the_end(model: nn.Module) -> None:
    model.norm.eps = 1e-5


def another_epsilon_in_the_blocks(model: nn.Module) -> None:
    for block in model.blocks:
        block.norm.eps = 1e-6


@pytest.mark.parametrize(
    "mistake",
    [
        moves_forgotten,
        left_for_right,
        bias_once,
        steps_driven_by_their_token,
        no_convolution_behind,
        another_epsilon_in_the_blocks,
    ],
)
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[nn.Module], None]) -> None:
    case = parity.find(CASES, "test_plainmamba", 110, scaled=True)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    mistake(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_the_last_epsilon_is_another() -> None:
    model = timm.create_model("test_plainmamba")
    assert model.norm.eps == 1e-6 and {block.norm.eps for block in model.blocks} == {1e-5}


def test_the_position_embedding_is_filtered_unless_as_published() -> None:
    case = parity.find(CASES, "test_plainmamba", 110, scaled=True)
    model = parity.prepare(case, to_published, checkpoint_filter_fn, published_quirks=False)
    assert parity.off_by(case, model) > 2 * LOGITS


def published_mixer(mixer: PlainMixer, order: str, tokens: Tensor, height: int, width: int) -> Tensor:
    """Route by route, in its own order: what goes in is laid out, what drives it is not."""
    x, z = mixer.in_proj(tokens).chunk(2, -1)
    x = mixer.conv2d(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2)
    u = F.silu(x)
    r, B, C = mixer.x_proj(u.transpose(1, 2)).transpose(1, 2).split([mixer.dt_rank, mixer.d_state, mixer.d_state], 1)
    dt = mixer.dt_weight @ r + mixer.dt_bias[:, None]
    total = torch.zeros_like(u)
    for route in scans.get(order).routes:
        table = route(height, width)
        moves = scans.visits(route, height, width)[1][table]
        y = selective_scan(
            u[:, :, table], dt, -mixer.A_log.exp(), B + mixer.move_B[moves].T, C, mixer.D, None, mixer.dt_bias, True,
            backend="reference",
        )  # fmt: skip
        total = total.index_add(2, table, y)
    return mixer.out_proj(total.transpose(1, 2) * F.silu(z))


@pytest.mark.parametrize("order", ["snake", "cross"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (4, 1), (3, 5)], ids=str)
def test_mixer_is_a_scan_along_each_route(order: str, grid: tuple[int, int]) -> None:
    mixer = PlainMixer(16, d_state=3, d_conv=3, scan_order=order).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(tokens, *grid), published_mixer(mixer, order, tokens, *grid))


def test_a_published_file_loads_strictly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = timm.create_model("test_plainmamba")
    state = to_published(source.state_dict())
    card = dict(file=str(tmp_path / "published.pth"))
    beside = {"ema_backbone_pos_embed": torch.zeros(1), "ema_head_fc_bias": torch.zeros(1)}
    torch.save({"state_dict": state | beside, "meta": {"epoch": 300}}, card["file"])
    with caplog.at_level(logging.INFO, "vision_mamba"):
        model = timm.create_model("test_plainmamba", pretrained=True, pretrained_cfg_overlay=card)
    assert "left out 2 tensors" in caplog.text
    own, theirs = model.state_dict(), source.state_dict()
    assert own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)

    del state["backbone.layers.1.mamba.direction_Bs"]
    torch.save({"state_dict": state | {"backbone.stranger": torch.zeros(1)}}, card["file"])
    with pytest.raises(ValueError, match=r"1 \(blocks\.1\.mixer\.move_B\) missing, 1 \(backbone\.stranger\) not used"):
        timm.create_model("test_plainmamba", pretrained=True, pretrained_cfg_overlay=card)


def test_other_sizes_of_images_and_patches_load() -> None:
    source = timm.create_model("test_plainmamba").eval()
    state = to_published(source.state_dict())
    other = timm.create_model("test_plainmamba", img_size=(96, 128), patch_size=8)
    other.load_state_dict(checkpoint_filter_fn(state, other))
    assert other.pos_embed.shape == (1, 12 * 16, 48) and other.patch_embed.proj.weight.shape == (48, 16, 4, 4)
    assert other(torch.randn(1, 3, 96, 128)).isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_released_weights_have_an_address(size: int) -> None:
    card = timm.get_pretrained_cfg(f"plainmamba_l{size}")
    assert card.url == f"https://huggingface.co/ChenhongyiYang/PlainMamba/resolve/main/l{size}.pth"
    assert card.tag == "in1k" and card.license == "apache-2.0" and card.crop_pct == 0.875


def test_initialisation_is_the_published_one() -> None:
    model = timm.create_model("test_plainmamba", embed_dim=128)
    mixer = model.blocks[1].mixer
    assert torch.equal(mixer.A_log, torch.arange(1.0, 5.0).log().expand(256, 4))
    assert torch.equal(mixer.D, torch.ones(256)) and not mixer.dt_bias.any() and not mixer.in_proj.bias.any()
    for weight in (mixer.in_proj.weight, mixer.x_proj.weight, mixer.dt_weight, mixer.out_proj.weight, model.pos_embed):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(mixer.move_B.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert float(model.head.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    for conv, fan in ((mixer.conv2d, 49), (model.patch_embed.proj, 64 * 16), (model.patch_embed.stem[0].conv, 147)):
        assert float(conv.weight.detach().abs().max()) == pytest.approx(fan**-0.5, rel=0.05)


def test_plain_torch_twin_for_exporters_agrees() -> None:
    model, twin = (timm.create_model("test_plainmamba", depth=1, exportable=flag).eval() for flag in (False, True))
    twin.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 16, 48)
    called: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.add(str(function))
            return function(*args, **(kwargs or {}))

    with torch.no_grad():
        expected = model(image)
        with Record():
            torch.testing.assert_close(twin(image), expected)
    assert called and not any("vision_mamba" in name for name in called)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(d_conv=4), "d_conv must be odd, got 4"),
        (dict(scan_order="atrous_2"), "must each visit every token, those of 'atrous_2' do not"),
        (dict(patch_size=7), "patch_size must be even, got 7"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("test_plainmamba", **arguments)


def test_the_examples_run() -> None:
    for module in (plain, plainmamba):
        tested = doctest.testmod(module)
        assert tested.attempted and not tested.failed
