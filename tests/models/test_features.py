"""Maps for detectors and segmenters, from every family: which, where, how large, and what a wrong index says."""

from __future__ import annotations

import doctest
from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor, nn

from tests.registered import SMALL, ends_in_tokens
from vision_mamba.layers import pyramid
from vision_mamba.layers.pyramid import SimpleFeaturePyramid

small_model = pytest.mark.parametrize("name", SMALL)
HIERARCHICAL = [name for name in SMALL if not ends_in_tokens(name)]
PLAIN = [name for name in SMALL if ends_in_tokens(name)]


def create(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


@small_model
def test_maps_are_those_of_forward_intermediates_and_lie_as_nchw(name: str) -> None:
    model, x = create(name), torch.randn(2, 3, 64, 96)
    chosen = (1, len(model.feature_info) - 1)
    backbone = create(name, features_only=True, out_indices=(1, -1))
    with torch.no_grad():
        maps = backbone(x)
        expected = model.forward_intermediates(x, indices=list(chosen), intermediates_only=True)
    for tap, other, channels, reduction in zip(
        maps, expected, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert tap.shape == (2, channels, 64 // reduction, 96 // reduction) and tap.is_contiguous()
        assert torch.equal(tap, other)


@small_model
def test_its_list_of_features_names_modules_that_end_in_them(name: str) -> None:
    model, x = create(name), torch.randn(1, 3, 64, 64)
    seen: list[Tensor] = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    prefix = getattr(model, "num_prefix_tokens", 0)
    assert len(seen) == len(maps)
    for output, tap, info in zip(seen, maps, model.feature_info, strict=True):
        assert tap.shape[1] == info["num_chs"]
        # Before any norm, and before the next stage makes the map smaller; class tokens stand among the tokens.
        assert output.numel() == tap.numel() + prefix * tap.shape[1]
        assert prefix or torch.equal(output.flatten().sort()[0], tap.flatten().sort()[0])


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_stages_halve_the_map(name: str) -> None:
    assert [info["reduction"] for info in create(name).feature_info] == [4, 8, 16, 32]


@small_model
@pytest.mark.parametrize("wrong", ["beyond", "before", "none", "many"])
def test_a_wrong_index_is_an_error_everywhere(name: str, wrong: str) -> None:
    model, x = create(name), torch.randn(1, 3, 32, 32)
    levels = len(model.feature_info)
    indices = {"beyond": [levels], "before": [-levels - 1], "none": 0, "many": levels + 1}[wrong]
    with pytest.raises((AssertionError, ValueError), match="out of range"):
        model.forward_intermediates(x, indices=indices)
    with pytest.raises((AssertionError, ValueError), match="out of range"):
        model.prune_intermediate_layers(indices)
    with pytest.raises((AssertionError, ValueError), match="out of range"):
        create(name, features_only=True, out_indices=indices)


@small_model
def test_maps_come_in_the_order_asked_for(name: str) -> None:
    model, x = create(name), torch.randn(1, 3, 64, 64)
    backbone = create(name, features_only=True, out_indices=(-1, 0, 1, 0))
    last = len(model.feature_info) - 1
    with torch.no_grad():
        maps = backbone(x)
        expected = model.forward_intermediates(x, intermediates_only=True)
        assert torch.equal(model.forward_intermediates(x, indices=[last, 0])[1][0], expected[last])
    assert len({tap.sum().item() for tap in expected}) == last + 1  # so that a map in a wrong place is seen
    for tap, index in zip(maps, (last, 0, 1, 0), strict=True):
        assert torch.equal(tap, expected[index])
    assert [tap.shape[1] for tap in maps] == backbone.feature_info.channels()


@small_model
def test_no_index_at_all_is_an_error(name: str) -> None:
    model = create(name)
    with pytest.raises(ValueError, match=r"out_indices.* are empty"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=[])
    with pytest.raises(ValueError, match=r"out_indices.* are empty"):
        model.prune_intermediate_layers([])


@small_model
def test_a_wrong_format_is_an_error(name: str) -> None:
    with pytest.raises((AssertionError, ValueError), match="NCHW"):
        create(name).forward_intermediates(torch.randn(1, 3, 32, 32), output_fmt="CHW")


@small_model
def test_what_is_pruned_is_gone_and_the_rest_is_the_same(name: str) -> None:
    model, x = create(name), torch.randn(1, 3, 64, 48)
    before = sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        (expected,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        (tap,) = model.forward_intermediates(x, indices=[1], intermediates_only=True)
    assert torch.equal(tap, expected)
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert isinstance(model.get_classifier(), nn.Identity)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_model_gets_the_strides_of_detectors(name: str) -> None:
    backbone = create(name, features_only=True, out_indices=[-1])
    simple = SimpleFeaturePyramid(backbone.feature_info.channels()[-1], 32)
    stride = backbone.feature_info.reduction()[-1]
    levels = simple(backbone(torch.randn(2, 3, 96, 64))[-1])
    assert list(levels) == ["0", "1", "2", "3"]
    for level, scale in zip(levels.values(), simple.scales, strict=True):
        assert level.shape == (2, 32, 96 * scale // stride, 64 * scale // stride)
    sum(level.square().mean() for level in levels.values()).backward()
    assert [n for n, p in simple.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_each_level_of_the_pyramid_knows_the_map_alone() -> None:
    both, one = SimpleFeaturePyramid(16, 8, (2, 1)), SimpleFeaturePyramid(16, 8, (1,))
    one.levels[0].load_state_dict(both.levels[1].state_dict())
    x = torch.randn(1, 16, 5, 3)
    assert torch.equal(one(x)["0"], both(x)["1"])


def test_levels_above_the_last_are_made_by_extra_blocks() -> None:
    class Pool(nn.Module):
        def forward(self, levels: list[Tensor], maps: list[Tensor], names: list[str]) -> tuple[list, list]:
            assert len(maps) == len(levels)
            return [*levels, levels[-1][:, :, ::2, ::2]], [*names, "pool"]

    levels = SimpleFeaturePyramid(16, 8, (1, 0.5), Pool())(torch.randn(1, 16, 8, 8))
    assert isinstance(levels, OrderedDict) and list(levels) == ["0", "1", "pool"]
    assert levels["pool"].shape == (1, 8, 2, 2)


@pytest.mark.parametrize("scale", [0, -1, 3, 0.3, 32])
def test_a_scale_that_is_no_power_of_two_is_refused(scale: float) -> None:
    with pytest.raises(ValueError, match=rf"power of 2 .* got {scale}"):
        SimpleFeaturePyramid(16, 8, (1, scale))


def test_examples_of_the_pyramid() -> None:
    done = doctest.testmod(pyramid)
    assert done.attempted and not done.failed
