"""Parts of gradients, added up in one launch: where the kernel looks, and on a GPU what it finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.tolerances import relative_rms
from vision_mamba.ops.backends import sums_cuda
from vision_mamba.ops.backends.sums_cuda import Parts


def views(device: str = "cpu") -> list[Tensor]:
    """Parts as kernels leave them: (P, ...), parts of larger tensors in several orders."""
    torch.manual_seed(0)
    convolution, crossed = torch.randn(9, 2, 5, 70, device=device), torch.randn(3, 8, 3, 33, device=device)
    return [
        convolution[:, :, 1:4].transpose(2, 3),
        convolution[:, :, 4],
        crossed.diagonal(dim1=0, dim2=2).permute(2, 0, 1)[:, :6].unsqueeze(0),
        torch.randn(300, 3, 31, device=device)[:, 1],
        torch.randn(17, 10, 5, device=device)[:, :9].transpose(1, 2).unflatten(2, (3, 3)).unsqueeze(2),
        torch.randn(2, 1, 1, device=device),
        torch.randn(2, 40, 2, 1, device=device).diagonal(dim1=0, dim2=2).permute(2, 0, 1).unsqueeze(0),
    ]


@pytest.mark.parametrize("which", range(7))
def test_jobs_name_every_element_once(which: int) -> None:
    parts = views()[which]
    memory = parts.untyped_storage()
    flat = torch.empty(0, dtype=parts.dtype).set_(memory, 0, (memory.nbytes() // 4,), (1,))[parts.storage_offset() :]
    tiles, (n1, n2, s0, s1, s2, d0, d1, d2) = sums_cuda._job(parts.shape, parts.stride())
    found = torch.full((parts[0].numel(),), torch.nan)
    for tile in range(tiles):
        across = -(-n2 // 32)
        b, a = tile // across % n1, tile // across // n1
        for c in range(tile % across * 32, min(tile % across * 32 + 32, n2)):
            place = a * d0 + b * d1 + c * d2
            taken = flat[a * s0 + b * s1 + c * s2 :: parts.stride(0)][: len(parts)]
            assert found[place].isnan()
            found[place] = taken.sum()
    assert relative_rms(found.view(parts.shape[1:]), parts.double().sum(0)) < 1e-6


@pytest.mark.gpu
def test_sums_on_gpu() -> None:
    parts = views("cuda")
    found, again = sums_cuda.sum_parts(parts), sums_cuda.sum_parts(parts)
    assert all(map(torch.equal, found, again))
    for total, part in zip(found, parts, strict=True):
        assert total.is_contiguous() and relative_rms(total, part.double().sum(0)) < 1e-6


def test_gradients_come_in_the_types_of_their_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums_cuda, "sum_parts", lambda parts: [part.sum(0) for part in parts])
    whole, parts, half = torch.randn(3), torch.randn(4, 3), torch.randn(3).bfloat16()
    found = sums_cuda.finished([whole, Parts(parts), None, Parts(parts)], [whole, half, whole, None])
    assert found[0] is whole and found[1] is not None and found[1].dtype == torch.bfloat16
    assert torch.equal(found[1], parts.sum(0).bfloat16()) and found[2] is None and found[3] is None
