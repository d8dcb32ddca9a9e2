"""MambaVision: the published results on weights made by rule, its mixer as an equation, its windows and cards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import nn

from tests import parity
from tests.tolerances import LOGITS
from vision_mamba.layers.windowed import ConcatMamba, cut_windows, join_windows
from vision_mamba.models.mambavision import MambaVision, checkpoint_filter_fn, to_published
from vision_mamba.ops import selective_scan

#: Parameters as published.
PARAMETERS = {
    "mambavision_tiny": 31_794_248,
    "mambavision_tiny2": 35_104_008,
    "mambavision_small": 50_140_584,
    "mambavision_base": 97_685_288,
    "mambavision_large": 227_961_048,
    "mambavision_large2": 241_554_824,
    "mambavision_large2_512": 241_554_824,
    "mambavision_large3_256": 739_570_472,
    "mambavision_large3_512": 739_570_472,
}
CASES = parity.read("mambavision")
QUICK = [case for case in CASES if case["parameters"] < 3.2e7]  # tools/parity.py runs them all


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_many_as_published(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("case", QUICK, ids=parity.describe)
def test_published_results(case: parity.Case) -> None:
    parity.check(case, to_published, checkpoint_filter_fn)


def mixers(model: MambaVision) -> list[ConcatMamba]:
    return [module for module in model.modules() if isinstance(module, ConcatMamba)]


def bias_counted_once(model: MambaVision) -> None:
    for mixer in mixers(model):
        mixer.dt_bias.data /= 2


def swap_halves(model: MambaVision) -> None:
    for mixer in mixers(model):
        mixer.in_proj.weight.data = mixer.in_proj.weight.data.roll(len(mixer.in_proj.weight) // 2, 0)


def exact_gelu(model: MambaVision) -> None:
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "none"


def usual_epsilon(model: MambaVision) -> None:
    for layer in (model.stem.conv1, model.stem.conv2):
        layer.bn.eps = 1e-5


@pytest.mark.parametrize("mistake", [bias_counted_once, swap_halves])
def test_the_fixtures_would_show_a_mistake(mistake: Callable[[MambaVision], None]) -> None:
    case = CASES[0]
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    mistake(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_the_fixtures_would_show_another_epsilon() -> None:
    case = parity.find(CASES, "mambavision_tiny", 224, scaled=True)
    model = parity.prepare(case, to_published, checkpoint_filter_fn)
    usual_epsilon(model)
    assert parity.off_by(case, model) > 2 * LOGITS


def test_only_convolutions_approximate_gelu() -> None:
    model = timm.create_model("test_mambavision")
    assert model.stages[0].blocks[0].act.approximate == "tanh"
    assert model.stages[2].blocks[0].mlp.act.approximate == "none"


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 3), (7, 8)], ids=str)
def test_windows_come_row_by_row_and_go_back(size: tuple[int, int]) -> None:
    x = torch.randn(2, *size, 3)
    windows = cut_windows(x, 2)
    assert windows.shape == (2 * -(-size[0] // 2) * -(-size[1] // 2), 4, 3)
    assert torch.equal(windows[0, 0], x[0, 0, 0])
    if min(size) > 3:
        assert torch.equal(windows[1], x[0, :2, 2:4].flatten(0, 1))
    assert torch.equal(join_windows(windows, 2, *size), x)


def test_an_exported_program_takes_a_single_window_too() -> None:
    class Windows(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return join_windows(cut_windows(x, 3).cumsum(1), 3, x.shape[1], x.shape[2])

    varies = {axis: torch.export.Dim(name, min=1) for axis, name in enumerate(("batch", "rows", "columns"))}
    program = torch.export.export(Windows(), (torch.randn(2, 5, 8, 4),), dynamic_shapes=(varies,)).module()
    for size in ((3, 3), (2, 1), (2, 7), (9, 3), (4, 10)):
        x = torch.randn(1, *size, 4)
        assert torch.equal(program(x), Windows()(x))


def test_mixer_is_a_scan_beside_a_convolution() -> None:
    mixer = ConcatMamba(8, d_state=3, dt_rank=2).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    tokens = torch.randn(2, 10, 8, dtype=torch.float64)
    x, z = mixer.in_proj(tokens).transpose(1, 2).chunk(2, 1)
    x, z = (F.silu(F.conv1d(h, c.weight, padding=1, groups=4)) for h, c in ((x, mixer.conv_x), (z, mixer.conv_z)))
    dt, B, C = mixer.x_proj(x.transpose(1, 2)).transpose(1, 2).split([2, 3, 3], 1)
    dt = mixer.dt_weight @ dt + mixer.dt_bias[:, None]
    y = selective_scan(
        x, dt, -mixer.A_log.exp(), B, C, mixer.D, delta_bias=mixer.dt_bias, delta_softplus=True, backend="reference"
    )
    torch.testing.assert_close(mixer(tokens), mixer.out_proj(torch.cat((y, z), 1).transpose(1, 2)))


def test_scans_come_before_attention() -> None:
    model = timm.create_model("test_mambavision")
    kinds = [[type(block.mixer) for block in stage.blocks] for stage in model.stages[2:]]
    assert kinds == [[ConcatMamba, ConcatMamba, Attention], [ConcatMamba, Attention]]


def test_what_the_hub_nests_loads() -> None:
    source, target = (timm.create_model("test_mambavision") for _ in range(2))
    nested = {f"model.{name}": tensor for name, tensor in to_published(source.state_dict()).items()}
    target.load_state_dict(checkpoint_filter_fn(nested, target))
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, target.state_dict()[name]), name


def test_initialisation_is_the_published_one() -> None:
    """The step sizes' projection too is a truncated normal, and its bias zero: what was meant for it is overwritten."""
    model = timm.create_model("test_mambavision", dims=(64,) * 4, num_heads=(1, 1, 2, 2), d_state=4)
    model.init_weights()
    mixer = model.stages[2].blocks[1].mixer
    assert not mixer.dt_bias.any() and torch.equal(mixer.D, torch.ones(32))
    assert torch.equal(mixer.A_log, torch.arange(1.0, 5.0).log().expand(32, 4))
    for weight in (mixer.dt_weight, mixer.x_proj.weight, model.stages[3].blocks[1].mixer.qkv.weight):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    bound = (9 * 64) ** -0.5
    assert 0.9 * bound < model.stages[1].downsample.conv.weight.detach().abs().max() <= bound
    assert torch.equal(model.stages[2].blocks[0].ls1.gamma, torch.full((64,), 0.1))


def test_its_cards_say_that_the_weights_are_not_for_commerce() -> None:
    for name in PARAMETERS:
        card = timm.get_pretrained_cfg(name)
        assert card.license == "cc-by-nc-sa-4.0" and card.hf_hub_id.startswith("nvidia/MambaVision-")
        assert card.input_size[1] == next((size for size in (256, 512) if name.endswith(f"_{size}")), 224)
        assert card.notes[0].startswith("top-1 8")


def test_stages_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="must name as many stages, got 4, 2, 4 and 4"):
        timm.create_model("test_mambavision", depths=(1, 1))
