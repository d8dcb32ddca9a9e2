"""The norms of layers are timm's and torch's, with one more way to run."""

from __future__ import annotations

import pytest
import timm.layers
import torch
from torch import nn

from vision_mamba.layers.norm import NORMS, LayerNorm, RMSNorm, before_product


@pytest.mark.parametrize(("ours", "theirs"), [(LayerNorm, timm.layers.LayerNorm), (RMSNorm, nn.RMSNorm)])
def test_is_the_same_norm(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    x, mine, other = torch.randn(2, 3, 8), ours(8, eps=1e-5), theirs(8, eps=1e-5)
    assert isinstance(mine, theirs)
    for parameter in mine.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(mine.state_dict())
    assert torch.equal(mine(x), other(x))
    assert torch.equal(torch.jit.script(mine)(x), other(x))
    assert torch.equal(torch.fx.symbolic_trace(mine)(x), other(x))
    assert torch.equal(torch.compile(mine, backend="eager", fullgraph=True)(x), other(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert before_product(mine)(x).dtype == other(x).dtype


def test_only_ours_is_marked() -> None:
    norm = before_product(nn.BatchNorm2d(3))
    assert not hasattr(norm, "before_product") and set(NORMS) == {"layernorm", "rmsnorm"}


@pytest.mark.gpu
@pytest.mark.parametrize("norm", NORMS.values())
def test_gives_products_what_they_take(norm: type[nn.Module]) -> None:
    norm = norm(8, eps=1e-5).cuda()
    x = torch.randn(2, 3, 8, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert norm(x).dtype == torch.float32
        assert before_product(norm)(x).dtype == torch.bfloat16
        compiled = torch.compile(norm, fullgraph=True)(x)
        assert compiled.dtype == torch.bfloat16
        torch.testing.assert_close(compiled, norm(x))
