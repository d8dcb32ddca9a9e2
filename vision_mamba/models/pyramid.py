"""What backbones of several stages have in common: all of timm's interfaces, on maps that are channels last."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vision_mamba.layers.joined import chains_on_gpu, eager_on_gpu, product_sum, run, stream, untouched
from vision_mamba.models.builder import build
from vision_mamba.models.taps import in_asked_order, take_indices


class Stage(nn.Module):
    """Downsampling, then blocks; (B, H, W, dim) -> (B, H', W', dim_out)."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def run_blocks(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                return checkpoint_seq(self.blocks, x)
            if chains_on_gpu(x) and untouched(self.blocks, nn.Sequential):
                return run(self.blocks, x)
        return self.blocks(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x))


class Pyramid(nn.Module):
    """A stem, stages of which all but the first begin by halving the map, a norm, a pool and a classifier.

    Activations are (B, H, W, C) from the stem to the classifier. What a family adds is how it builds these parts, and
    what of them takes no weight decay.

    Args:
        stem: (B, in_chans, H, W) -> (B, H / P, W / P, C).
        stages: each maps (B, H, W, C) to (B, H', W', C').
        norm: of the last stage's map, before the pool.
        dims: C, channels that each stage ends with.
        patch_size: P, reduction of the stem.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 for none.
        global_pool: pooling before the classifier; '' for none.
        drop_rate: dropout before the classifier.
        img_size: nominal image size, recorded for data configurations; every size runs whatever it is.

    Shape: (B, in_chans, H, W) -> (B, num_classes).
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Iterable[nn.Module],
        norm: nn.Module,
        dims: Sequence[int],
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        img_size: int | tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=dim, reduction=patch_size * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm = norm
        self.head = ClassifierHead(
            self.num_features, num_classes, global_pool, drop_rate, input_fmt=self.output_fmt, **dd
        )
        self.head_hidden_size = self.head.num_features
        if img_size is not None:
            self.set_input_size(img_size)
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialise as published: projections by a truncated normal, the rest by what each module says of itself.

        Args:
            needs_reset: False if all modules have just been constructed, and so initialised themselves.
        """
        self.apply(partial(_init_weights, needs_reset=needs_reset))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(
            stem=r"^stem",
            blocks=r"^stages\.(\d+)"
            if coarse
            else [
                (r"^stages\.(\d+)\.downsample", (0,)),
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Record another nominal image size; nothing of the model depends on it."""
        update_model_input_size(self, img_size)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new classifier in place, keeping the pooling unless another is named."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps that the stages end in.

        Args:
            x: (B, in_chans, H, W) images.
            indices: stages to take, in any order; the last n if a number, all by default.
            norm: apply the final norm to the last stage's map.
            stop_early: leave out what comes behind the last map taken.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return the maps alone.

        Returns: (features, maps), or maps.
        """
        assert output_fmt in ("NCHW", "NHWC"), "Output format must be one of NCHW or NHWC."
        taken, max_index = take_indices(len(self.stages), indices)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice a Sequential
            stages = self.stages
        else:
            stages = self.stages[: max_index + 1]

        x = self.stem(x)
        intermediates = []
        last = len(self.stages) - 1
        i = 0
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in taken:
                tap = self.norm(x) if norm and i == last else x
                intermediates.append(tap.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else tap)
        intermediates = in_asked_order(intermediates, taken)
        if intermediates_only:
            return intermediates
        if i == last:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the named maps do not need; returns their indices."""
        taken, max_index = take_indices(len(self.stages), indices)
        prune_end = max_index < len(self.stages) - 1
        if prune_norm or prune_end:
            self.norm = nn.Identity()  # it is sized for the last stage
        self.stages = self.stages[: max_index + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_head or prune_end:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, H', W', C), normed."""
        x = self.stem(x)
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would look into both sides of an "and"
            if eager_on_gpu(x) and untouched(self.stages, nn.Sequential):
                return self.norm(_run_stages(self.stages, x))
        return self.norm(self.stages(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=True) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _run_stages(stages: Iterable[Any], x: Tensor) -> Tensor:
    """Stages one after the other; the sum that a stage ends in is taken as the next one reads it."""
    branch: Tensor | None = None
    for stage in stages:
        known = untouched(stage, Stage) and untouched(stage.blocks, nn.Sequential) and not stage.grad_checkpointing
        if branch is not None:
            first = getattr(stage.downsample, "multiplies_first", None) if known else None
            x = product_sum(x, branch) if first is not None and first() else x + branch
        if known:
            x, branch = stream(stage.blocks, stage.downsample(x))
        else:
            x, branch = stage(x), None
    return x if branch is None else x + branch


def _init_weights(module: nn.Module, needs_reset: bool) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and callable(reset := getattr(module, "reset_parameters", None)):
        reset()


def drop_path_rates(last: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth, growing linearly from 0 at the first block to that of the last, stage by stage."""
    return cast(list[list[float]], calculate_drop_path_rates(last, list(depths), stagewise=True))


def build_pyramid(
    model: type[nn.Module], variant: str, pretrained: bool, filter_fn: Callable[..., Any], **kwargs: Any
) -> Any:
    """timm's builder, for a model whose features are those of all its stages."""
    features = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build(model, variant, pretrained, filter_fn, features, **kwargs)
