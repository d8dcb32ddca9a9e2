"""Stems and downsamplings: sizes, the order in which patches are joined, channels last in and out."""

from __future__ import annotations

import math

import pytest
import torch

from vision_mamba.layers import patch
from vision_mamba.layers.embed import StridedPatchEmbed
from vision_mamba.layers.norm import LayerNorm
from vision_mamba.layers.patch import DOWNSAMPLES, STEMS, PatchMerging

SIZES = [(32, 48), (33, 47), (8, 9)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("kind", STEMS)
def test_stems_divide_by_the_patch_size(kind: str, patch_size: int, size: tuple[int, int]) -> None:
    y = STEMS[kind](5, 16, patch_size)(torch.randn(2, 5, *size))
    rounded = math.floor if kind == "patch" else math.ceil
    assert y.shape == (2, *(rounded(s / patch_size) for s in size), 16)
    assert y.is_contiguous()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", DOWNSAMPLES)
def test_downsamplings_halve(kind: str, size: tuple[int, int]) -> None:
    y = DOWNSAMPLES[kind](8, 12)(torch.randn(2, *size, 8))
    rounded = math.floor if kind == "patch" else math.ceil
    assert y.shape == (2, *(rounded(s / 2) for s in size), 12)
    assert y.is_contiguous()


def test_patches_are_joined_rows_first_and_odd_maps_padded_by_zeros() -> None:
    merge = PatchMerging(1, 4, norm_layer=lambda *_, **__: torch.nn.Identity())
    with torch.no_grad():
        merge.reduction.weight.copy_(torch.eye(4))
        y = merge(torch.arange(1.0, 10.0).view(1, 3, 3, 1))
    assert y.flatten(1, 2)[0].tolist() == [[1, 4, 2, 5], [3, 6, 0, 0], [7, 0, 8, 0], [9, 0, 0, 0]]


def test_patches_as_one_product_are_the_convolution() -> None:
    embed = StridedPatchEmbed(20, (4, 8), in_chans=2, embed_dim=6)
    x = torch.randn(3, 2, 20, 24)
    assert not embed._is_product(x), "on a CPU the convolution runs"
    torch.testing.assert_close(embed._product(x), embed(x))


@pytest.mark.parametrize("kind", ["stem", "downsample"])
def test_the_norm_may_add_the_bias_of_the_convolution(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = STEMS["overlap"](3, 8, 4, LayerNorm) if kind == "stem" else DOWNSAMPLES["overlap"](3, 8, LayerNorm)
    x = torch.randn(2, 3, 16, 16) if kind == "stem" else torch.randn(2, 16, 16, 3)
    expected = layer(x)
    biases: list[torch.Tensor] = []
    given = patch.conv_norm
    monkeypatch.setattr(patch, "eager_on_gpu", lambda x: True)
    monkeypatch.setattr(patch, "conv_norm", lambda x, conv, norm: biases.append(conv.bias) or given(x, conv, norm))
    torch.testing.assert_close(layer(x), expected)
    assert len(biases) == (2 if kind == "stem" else 1)
