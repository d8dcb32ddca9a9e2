"""Sequence models of any token mixer: the residual stack that Mamba is published in, and a classifier on it."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from timm.layers import DropPath, calculate_drop_path_rates
from torch import Tensor, nn

from vision_mamba import ops
from vision_mamba.layers.joined import untouched
from vision_mamba.layers.mamba import Mamba, StepProjection
from vision_mamba.layers.norm import RMSNorm

Cache = tuple[Tensor, ...]


def dtype_of(module: nn.Module) -> torch.dtype:
    """Type of a module's parameters, which is what it takes."""
    return next(module.parameters()).dtype


def add_norm(x: Tensor, residual: Tensor | None, norm: nn.Module, wide: bool) -> tuple[Tensor, Tensor]:
    """The norm of residual + x, in the type of the norm, and that sum, in float32 at least if `wide`.

    On GPUs it is one pass over memory for the stack's own norm of a residual of the norm's type.
    """
    if residual is not None and isinstance(norm, RMSNorm) and untouched(norm, RMSNorm) and norm.eps is not None:
        kind = residual.dtype
        if norm.weight.dtype == kind == torch.promote_types(x.dtype, kind):
            return ops.add_normed(residual, x, norm.weight, None, norm.eps, rms=True)
    total = x if residual is None else residual + x
    if wide:
        total = total.to(torch.promote_types(total.dtype, torch.float32))
    return norm(total.to(dtype_of(norm))), total


class MixerBlock(nn.Module):
    """A norm before a mixer, and what of it is dropped; the stack says in which order they are run."""

    def __init__(self, norm: nn.Module, mixer: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.mixer: Any = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """What the block adds to x."""
        return self.mix(self.norm(x.to(dtype_of(self.norm))), cache)

    def mix(self, normed: Tensor, cache: Cache | None) -> Tensor:
        return self.drop_path(self.mixer(normed) if cache is None else self.mixer(normed, cache))


class MixerStack(nn.Module):
    """x_i = x_{i-1} + mixer_i(norm_i(x_{i-1})) for each block, then a last norm.

    It is run in one of two orders that compute the same sums. Plain: norm, mix, add. Fused: add, norm, mix, where a
    block takes what the one before adds and the stream beside it, so that addition and norm are neighbours and can be
    one pass over memory. Parameters are named as in mamba_ssm's `MixerModel`.

    Args:
        dim: E, width of the tokens.
        depth: number of blocks.
        mixer: makes a mixer, called as ``mixer(dim, device=..., dtype=...)``: `Mamba`, `vision_mamba.ssm.S4D`, or a
            functools.partial of one. With caches, it has `allocate_inference_cache` and ``forward(x, cache)``.
        fused_add_norm: run in the fused order.
        residual_in_fp32: keep the stream between the blocks in float32 at least.
        rescale: divide the weight of every mixer's out_proj by the square root of depth, as published for Mamba, since
            the stream has as many addends.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.
        norm_layer: makes a norm of E; RMSNorm with eps 1e-5 by default.

    Shape: (B, L, E) -> (B, L, E).
    Reference: Gu and Dao 2023, Mamba, arXiv:2312.00752, figure 3.

    >>> MixerStack(32, depth=2)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        mixer: Callable[..., nn.Module] = Mamba,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = True,
        rescale: bool = True,
        drop_path_rate: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(RMSNorm, eps=1e-5) if norm_layer is None else norm_layer
        self.dim, self.fused_add_norm, self.residual_in_fp32 = dim, fused_add_norm, residual_in_fp32
        rates = cast(list[float], calculate_drop_path_rates(drop_path_rate, depth))
        self.layers = nn.ModuleList(MixerBlock(norm(dim, **dd), mixer(dim, **dd), rate) for rate in rates)
        self.norm_f = norm(dim, **dd)
        if rescale:
            with torch.no_grad():
                for layer in self._blocks():
                    layer.mixer.out_proj.weight.div_(depth**0.5)

    def forward(self, x: Tensor, caches: list[Cache] | None = None) -> Tensor:
        """The whole sequence, or its next part where there are caches, which are left at the last token."""
        if caches is not None and len(caches) != len(self.layers):
            raise ValueError(
                f"MixerStack: caches must be one for each of the {len(self.layers)} blocks, got {len(caches)}; make "
                f"them by allocate_inference_cache."
            )
        steps = zip(self._blocks(), [None] * len(self.layers) if caches is None else caches, strict=True)
        residual: Tensor | None = None
        if self.fused_add_norm:
            for layer, cache in steps:
                normed, residual = add_norm(x, residual, layer.norm, self.residual_in_fp32)
                x = layer.mix(normed, cache)
            return add_norm(x, residual, self.norm_f, self.residual_in_fp32)[0]
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        for layer, cache in steps:
            x = x + layer(x, cache)
        return self.norm_f(x.to(dtype_of(self.norm_f)))

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> list[Cache]:
        """The states of every mixer before the first token."""
        return [layer.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype) for layer in self._blocks()]

    def _blocks(self) -> Iterable[MixerBlock]:
        return cast(Iterable[MixerBlock], self.layers)


#: What the classifier reads of a sequence.
POOLS = ("last", "avg")


class SequenceClassifier(nn.Module):
    """Classify a sequence: an embedding of its elements, a stack of mixers, one token or their mean, a linear head.

    Args:
        embed: makes tokens (B, L, E) of the input: ``nn.Embedding(words, E)``, ``nn.Linear(features, E)``, or for
            images timm's ``PatchEmbed(img_size, patch_size, in_chans, E)``.
        stack: what they go through.
        num_classes: classes of the head.
        pool: "last", the token that has seen all others, or "avg", the mean of all.
        drop_rate: dropout before the head.

    Raises: ValueError for an unknown pool, or an embedding that is no sequence of the stack's width.

    >>> words = SequenceClassifier(nn.Embedding(100, 32), MixerStack(32, depth=2), num_classes=5)
    >>> words(torch.randint(100, (2, 20))).shape
    torch.Size([2, 5])
    >>> from timm.layers import PatchEmbed
    >>> images = SequenceClassifier(PatchEmbed(32, 4, 3, 32), MixerStack(32, depth=2), num_classes=5, pool="avg")
    >>> images(torch.randn(2, 3, 32, 32)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self, embed: nn.Module, stack: MixerStack, num_classes: int, pool: str = "last", drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"SequenceClassifier: pool must be one of {', '.join(POOLS)}, got {pool!r}.")
        self.pool = pool
        self.embed = embed
        self.stack = stack
        self.head_drop = nn.Dropout(drop_rate)
        weight = next(stack.parameters())
        self.head = nn.Linear(stack.dim, num_classes, device=weight.device, dtype=dtype_of(stack.norm_f))

    def no_weight_decay(self) -> set[str]:
        """Parameters that decay would bend towards another model: those of the state spaces."""
        steps = {f"{name}.bias" for name, module in self.named_modules() if isinstance(module, StepProjection)}
        return steps | {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in STATE_SPACE}

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits (B, classes); of padded sequences only the first `lengths` (B,), at least 1 each, are read."""
        tokens = self.embed(x)
        if tokens.dim() != 3 or tokens.shape[2] != self.stack.dim:
            raise ValueError(
                f"SequenceClassifier: embed must give tokens (batch, length, {self.stack.dim}), the width of the "
                f"stack, got {tuple(tokens.shape)}."
            )
        return self.head(self.head_drop(self._pool(self.stack(tokens), lengths)))

    def _pool(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            return tokens[:, -1] if self.pool == "last" else tokens.mean(1)
        if lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"SequenceClassifier: lengths must be (batch,) = ({tokens.shape[0]},), got {tuple(lengths.shape)}."
            )
        # Values on a GPU are not waited for: there a length that is none gives NaN.
        readable = lengths.is_cpu and not torch.compiler.is_compiling()
        if readable and bool(((lengths < 1) | (lengths > tokens.shape[1])).any()):
            raise ValueError(
                f"SequenceClassifier: lengths must be from 1 to the {tokens.shape[1]} tokens, got {lengths.tolist()}."
            )
        place = torch.arange(tokens.shape[1], device=tokens.device)
        lengths = lengths.unsqueeze(1)
        # No token comes before what it reads, so padding behind a sequence is not seen and only has to be left out.
        seen = place == lengths - 1 if self.pool == "last" else place < lengths
        share = seen.to(tokens.dtype) / seen.sum(1, keepdim=True)
        return torch.einsum("bl,ble->be", share, tokens)


#: Last names of the parameters of `Mamba`, `Mamba2` and `S4D` that stay out of weight decay.
STATE_SPACE = {"A_log", "A_real_log", "A_imag", "B", "C", "D", "dt_bias", "log_dt"}
