"""Vim, the first state-space backbone of images: a plain stack of bidirectional Mamba mixers over patch tokens.

Zhu et al. 2024, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
arXiv:2401.09417. Published code and weights: https://github.com/hustvl/Vim (Apache-2.0).
"""

import argparse
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    DropPath,
    LayerScale,
    LayerType,
    _assert,
    apply_rot_embed,
    get_device_dtype,
    get_norm_layer,
    global_pool_nlc,
    lecun_normal_,
    trunc_normal_,
)
from timm.models import (
    checkpoint,
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
)
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from vision_mamba.layers.bimamba import BiMamba
from vision_mamba.layers.embed import PatchGrid, StridedPatchEmbed
from vision_mamba.layers.init import init_in_float32_
from vision_mamba.layers.joined import (
    chains_on_gpu,
    eager_on_gpu,
    is_product,
    is_usual_norm,
    run,
    stream,
    untouched,
)
from vision_mamba.layers.local import LocalMamba
from vision_mamba.layers.norm import NORMS, RMSNorm, before_product
from vision_mamba.layers.tokens import (
    CLASS_TOKENS,
    class_alone,
    class_first,
    insert_class,
    resample_pos_embed,
    rotation,
)
from vision_mamba.models.builder import build
from vision_mamba.models.checkpoint import require_all_used, unwrap
from vision_mamba.models.patches import fit_patches, take_out_rotations
from vision_mamba.models.taps import in_asked_order, take_indices

__all__ = ["VisionMamba"]

_log = logging.getLogger("vision_mamba")

POOLS = ("", "token", "avg", "avgmax", "max")


class Block(nn.Module):
    """x + drop_path(scale(mixer(norm(x)))). The published add -> norm -> mixer with two streams is the same sum.

    The mixer is told the grid of the patches too. A rotation comes before all else, and stays in the stream.
    """

    def __init__(
        self,
        dim: int,
        norm_layer: Callable[..., nn.Module],
        mixer: Callable[..., nn.Module],
        init_values: float | None = None,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = before_product(norm_layer(dim, **dd))
        self.mixer = mixer(dim, **dd)
        self.ls = nn.Identity() if init_values is None else LayerScale(dim, init_values=init_values, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, height: int, width: int, turns: Tensor | None = None) -> Tensor:
        if turns is not None:
            x = apply_rot_embed(x, turns[0], turns[1])
        return x + self.drop_path(self.ls(self.mixer(self.norm(x), height, width)))

    def joins(self, x: Tensor) -> bool:
        """Whether the norm runs with what is before and behind it; see `layers.joined`."""
        usual = untouched(self, Block) and is_usual_norm(self.norm)
        return chains_on_gpu(x) and usual and untouched(self.mixer, BiMamba) and is_product(self.mixer.in_proj)

    def ahead(self) -> tuple[list[Tensor], list[Tensor]]:
        mixer: Any = self.mixer
        return [mixer.in_proj.weight, mixer.x_proj_weight, mixer.dt_weight, mixer.out_proj.weight], [mixer.A_log]

    def join(
        self, x: Tensor, branch: Tensor | None, height: int, width: int, turns: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As forward, of a stream x + branch, into a stream and what is to be added to it."""
        if turns is not None:
            x, branch = apply_rot_embed(x if branch is None else x + branch, turns[0], turns[1]), None
        mixer: Any = self.mixer
        y, x = mixer.mix_normed(x, branch, self.norm)
        return x, self.drop_path(self.ls(y))


class VisionMamba(nn.Module):
    """Vim: patch tokens and a class token among them, through blocks of bidirectional Mamba mixers.

    Inside, the sequence is in scan order with the class token at its place. What leaves the model (`forward_features`
    and its relatives) has the class token first, where everything written for vision transformers looks for it.

    Under autocast the stream between the blocks is float32, as published: it takes the type of the position embedding.

    Args:
        img_size: nominal image size, which the position embedding is made for.
        patch_size: side of a patch.
        stride: pixels from patch to patch; the patch's size by default, less makes them overlap.
        in_chans: channels of the image.
        num_classes: classes of the head, 0 for none.
        global_pool: what the head sees: "token", "avg", "max", "avgmax" (over patches) or "" for all tokens.
        embed_dim: E, width of the tokens.
        depth: number of blocks.
        d_state: N, states of a channel.
        d_conv: taps of the mixers' convolutions.
        expand: inner width of a mixer over E.
        dt_rank: R, rank of the step sizes; E / 16 rounded up by default.
        average_routes: mixers take the mean of their scans, not the sum.
        norm_columns: bound what drives the scans by a norm, see `RouteMamba`.
        scan_order: name of a registered `ScanOrder` over the grid of patches, or one for every block: mixers are then
            those of LocalMamba. By default they are Vim's, both ways along the sequence.
        init_values: start of a learned scale on every block's output; none by default.
        class_token: its place: "middle" (M // 2 among M patches), "head", "none", or "double" for one at either end, of
            which the head then sees the mean.
        pos_embed: learn a position embedding, the class token's included.
        rope: turn the tokens by their place before every block; turns add up through the depth, as published.
        published_quirks: on other grids than the nominal one do as LocalMamba's published code: resample the rotations
            and, without a filter, the position embedding, and misplace results of columns unless the grid is square.
        dynamic_img_size: take images of any size, resampling the position embedding; else refuse other sizes.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        published_weight_decay: let weight decay reach what the published training's reached, see `no_weight_decay`.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this at the last.
        norm_layer: class or timm name of the norms; RMSNorm with eps 1e-5 by default.
        final_norm_layer: the same of the norm behind the blocks; that of all by default.
        embed_layer: what cuts the image up.
        block_layers: what makes each block of its width; `Block` around Vim's or LocalMamba's mixers by default. With
            them, what is said here of mixers and of norms within blocks is theirs.

    Reference: Zhu et al. 2024, arXiv:2401.09417.
    """

    dynamic_img_size: Final[bool]

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        dt_rank: int | None = None,
        average_routes: bool = True,
        norm_columns: bool = False,
        scan_order: str | Sequence[str] | None = None,
        init_values: float | None = None,
        class_token: str = "middle",
        pos_embed: bool = True,
        rope: bool = False,
        published_quirks: bool = False,
        published_weight_decay: bool = False,
        dynamic_img_size: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: LayerType | None = None,
        final_norm_layer: LayerType | None = None,
        embed_layer: Callable[..., PatchGrid] = StridedPatchEmbed,
        block_layers: Sequence[Callable[..., nn.Module]] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        places = tuple(CLASS_TOKENS)
        _assert(class_token in places, f"VisionMamba: class_token must be one of {places}, got {class_token!r}.")
        self.class_token = class_token
        self.has_class_token = self.has_cls_token = class_token != "none"
        self._check_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = CLASS_TOKENS[class_token]
        self.dynamic_img_size = dynamic_img_size
        self.rope = rope
        self.published_quirks = published_quirks
        self.published_weight_decay = published_weight_decay
        self.grad_checkpointing = False
        norm: Callable[..., nn.Module] = (
            NORMS.get(str(norm_layer)) or get_norm_layer(norm_layer) or partial(RMSNorm, eps=1e-5)
        )

        self.patch_embed = embed_layer(
            img_size, patch_size, stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size, **dd
        )
        tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.cls_token = (
            nn.Parameter(torch.empty(self.num_prefix_tokens, 1, embed_dim, **dd)) if self.has_class_token else None
        )
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, embed_dim, **dd)) if pos_embed else None
        self.pos_drop = nn.Dropout(pos_drop_rate)

        # The published code drops what comes into a block, one block late: block i loses its output at rate i.
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        mixer: dict[str, Any] = dict(
            d_state=d_state,
            d_conv=d_conv,
            expand=expand,
            dt_rank=dt_rank,
            average=average_routes,
            norm_columns=norm_columns,
        )
        along_grid = partial(LocalMamba, class_token=class_token, published_quirks=published_quirks, **mixer)
        if block_layers is None:
            mixers = [
                partial(BiMamba, **mixer) if order is None else partial(along_grid, scan_order=order)
                for order in self._per_block(scan_order, depth)
            ]
            block_layers = [partial(Block, norm_layer=norm, mixer=mixer, init_values=init_values) for mixer in mixers]
        self.blocks = nn.ModuleList(
            make(embed_dim, drop_path=rate, **dd) for make, rate in zip(block_layers, rates, strict=True)
        )
        self.norm = (get_norm_layer(final_norm_layer) or norm)(embed_dim, **dd)
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [dict(num_chs=embed_dim, reduction=reduction, module=f"blocks.{i}") for i in range(depth)]

        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Fill all parameters as published.

        Args:
            needs_reset: fill those of the submodules anew too, as is needed after `to_empty`.
        """
        if needs_reset:
            for module in self.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
        init_in_float32_(self.patch_embed.proj.weight, lecun_normal_)
        for table in (self.pos_embed, self.cls_token, getattr(self.head, "weight", None)):
            if table is not None:
                init_in_float32_(table, trunc_normal_, std=0.02)
        for name, parameter in self.named_parameters():
            if name in ("patch_embed.proj.bias", "head.bias"):
                nn.init.zeros_(parameter)
            elif name.endswith("out_proj.weight"):
                # As many addends go into the stream as there are blocks.
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
                with torch.no_grad():
                    parameter.div_(math.sqrt(len(self.blocks)))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The published training left out less, A_log decayed with the matrices."""
        exempt = {"pos_embed", "cls_token", "blocks.*.D", "blocks.*.dt_bias", "blocks.*.conv_bias"}
        return exempt if self.published_weight_decay else exempt | {"blocks.*.A_log"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    @staticmethod
    def _per_block(scan_order: str | Sequence[str] | None, depth: int) -> Sequence[str | None]:
        if scan_order is None or isinstance(scan_order, str):
            return [scan_order] * depth
        _assert(
            len(scan_order) == depth,
            f"VisionMamba: scan_order must be one name or one for each of the {depth} blocks, got {len(scan_order)}.",
        )
        return scan_order

    @torch.jit.ignore
    def _check_pool(self, global_pool: str) -> None:
        _assert(global_pool in POOLS, f"VisionMamba: global_pool must be one of {POOLS}, got {global_pool!r}.")
        _assert(
            global_pool != "token" or self.has_class_token,
            "VisionMamba: global_pool='token' needs a class token, got class_token='none'; use global_pool='avg'.",
        )

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a new head for that many classes, and another pooling if one is named."""
        if global_pool is not None:
            self._check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    @torch.jit.ignore
    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the nominal image size and resample the position embedding to it for good."""
        before = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        if self.pos_embed is not None and self.patch_embed.grid_size != before:
            with torch.no_grad():
                table = resample_pos_embed(self.pos_embed, self.patch_embed.grid_size, before, self.class_token)
            self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)
        update_model_input_size(self, self.patch_embed.img_size)

    def _embed(self, x: Tensor) -> tuple[Tensor, int, int, Tensor | None]:
        """(B, in_chans, H, W) image -> (B, L, E) tokens in scan order, the grid of patches, and their rotation."""
        x = self.patch_embed(x)
        height, width = x.shape[1], x.shape[2]
        x = x.flatten(1, 2)
        token: Tensor | None = None
        if self.cls_token is not None:
            token = self.cls_token.transpose(0, 1)
        if self.pos_embed is not None:
            table: Tensor = self.pos_embed
            if self.dynamic_img_size:
                nominal, quirk = self.patch_embed.grid_size, self.published_quirks
                table = resample_pos_embed(table, (height, width), nominal, self.class_token, not quirk)
            table, n = class_first(table, self.class_token), self.num_prefix_tokens
            x = x + table[:, n:]
            if token is not None:
                token = token + table[:, :n]
        if token is not None:
            x = insert_class(x, token.expand(x.shape[0], -1, -1), self.class_token)
        turns: Tensor | None = None
        if self.rope:
            nominal, quirk = self.patch_embed.grid_size, self.published_quirks
            turns = rotation(x, (height, width), nominal, self.class_token, quirk)
        return self.pos_drop(x), height, width, turns

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features and what came out of some of the blocks before.

        Args:
            x: (B, in_chans, H, W) images.
            indices: blocks to tap, in any order; an int takes the last so many, None all.
            return_prefix_tokens: give (patches, class token) pairs.
            norm: apply the final norm to every tap.
            stop_early: do not run blocks after the last one tapped.
            output_fmt: "NCHW" maps or "NLC" tokens, of patches alone.
            intermediates_only: leave the features out.

        Returns: (features as of forward_features, taps), or the taps alone.
        """
        _assert(output_fmt in ("NCHW", "NLC"), "VisionMamba: output_fmt must be 'NCHW' or 'NLC'.")
        taken, max_index = take_indices(len(self.blocks), indices)
        x, height, width, turns = self._embed(x)
        taps: list[Tensor] = []
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice modules
            blocks = self.blocks
        else:
            blocks = self.blocks[: max_index + 1]
        for i, block in enumerate(blocks):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, height, width, turns)
            else:
                x = block(x, height, width, turns)
            if i in taken:
                taps.append(class_first(self.norm(x) if norm else x, self.class_token))

        taps = in_asked_order(taps, taken)
        prefix = [tap[:, : self.num_prefix_tokens] for tap in taps]
        taps = [tap[:, self.num_prefix_tokens :] for tap in taps]
        if output_fmt == "NCHW":
            taps = [tap.unflatten(1, (height, width)).permute(0, 3, 1, 2).contiguous() for tap in taps]
        if not torch.jit.is_scripting() and return_prefix_tokens and self.num_prefix_tokens:
            taps = list(zip(taps, prefix, strict=True))  # type: ignore[arg-type]
        if intermediates_only:
            return taps
        return class_first(self.norm(x), self.class_token), taps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Throw away what comes after the last block tapped.

        Args:
            indices: blocks to tap, as in forward_intermediates.
            prune_norm: throw the final norm away.
            prune_head: throw the head away.

        Returns: the indices as non-negative numbers.
        """
        taken, max_index = take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _run_blocks(self, x: Tensor, height: int, width: int, turns: Tensor | None) -> Tensor:
        if not torch.jit.is_scripting():
            if self.grad_checkpointing:
                for block in self.blocks:
                    x = checkpoint(block, x, height, width, turns)
                return x
            if chains_on_gpu(x):
                return run(self.blocks, x, height, width, turns)
        for block in self.blocks:
            x = block(x, height, width, turns)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) images -> (B, L, E) normed tokens, the class token first."""
        x, height, width, turns = self._embed(x)
        x = self._run_blocks(x, height, width, turns)
        return class_first(self.norm(x), self.class_token)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, L, E) features -> (B, num_classes) logits, or the pooled features before the head."""
        if self.global_pool == "token" and self.num_prefix_tokens > 1:
            x = x[:, : self.num_prefix_tokens].mean(1)
        else:
            x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _class_features(self, x: Tensor) -> Tensor:
        """As forward_features, of the class tokens alone: what no head reads is neither added up nor normed."""
        x, height, width, turns = self._embed(x)
        x, branch = stream(self.blocks, x, height, width, turns)
        x = class_alone(x, self.class_token)
        return self.norm(x if branch is None else x + class_alone(branch, self.class_token))

    def _reads_class_alone(self, x: Tensor) -> bool:
        own = "forward_features" in vars(self) or type(self).forward_features is not VisionMamba.forward_features
        unseen = eager_on_gpu(x) and is_usual_norm(self.norm) and not (own or self.grad_checkpointing)
        return unseen and self.global_pool == "token"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript would look into both sides of an "and"
            if self._reads_class_alone(x):
                return self.forward_head(self._class_features(x))
        return self.forward_head(self.forward_features(x))


# Our names -> published names, within a block; several mean one of our tensors is theirs of either way, stacked.
_BLOCK_NAMES = {
    "norm.weight": ("norm.weight",),
    "norm.bias": ("norm.bias",),
    "ls.gamma": ("mixer.gamma",),
    "mixer.in_proj.weight": ("mixer.in_proj.weight",),
    "mixer.conv_weight": ("mixer.conv1d.weight", "mixer.conv1d_b.weight"),
    "mixer.conv_bias": ("mixer.conv1d.bias", "mixer.conv1d_b.bias"),
    "mixer.x_proj_weight": ("mixer.x_proj.weight", "mixer.x_proj_b.weight"),
    "mixer.dt_weight": ("mixer.dt_proj.weight", "mixer.dt_proj_b.weight"),
    "mixer.dt_bias": ("mixer.dt_proj.bias", "mixer.dt_proj_b.bias"),
    "mixer.A_log": ("mixer.A_log", "mixer.A_b_log"),
    "mixer.D": ("mixer.D", "mixer.D_b"),
    "mixer.out_proj.weight": ("mixer.out_proj.weight",),
}


def published_names(name: str, class_token: str = "middle") -> tuple[str, ...]:
    """What the published code calls one of our parameters: one name, or two if ours is theirs of either way, stacked.

    Two class tokens have a name each as well.

    >>> published_names("blocks.3.mixer.A_log")
    ('layers.3.mixer.A_log', 'layers.3.mixer.A_b_log')
    """
    if name.startswith("blocks."):
        _, number, rest = name.split(".", 2)
        return tuple(f"layers.{number}.{official}" for official in _BLOCK_NAMES[rest])
    if name == "cls_token" and class_token == "double":
        return "cls_token_head", "cls_token_tail"
    return (name.replace("norm.", "norm_f."),)


Names = Callable[[str], tuple[str, ...]]


def to_published(state_dict: dict[str, Tensor], names: Names = published_names) -> dict[str, Tensor]:
    """Rename and unstack our state dict into what the published code loads; the inverse of checkpoint_filter_fn."""
    published = {}
    for name, tensor in state_dict.items():
        theirs = names(name)
        for official, part in zip(theirs, tensor.unbind() if len(theirs) > 1 else (tensor,), strict=True):
            squeezed = part.dim() == 2 and ("conv1d" in official or "cls_token" in official)
            published[official] = part.unsqueeze(1) if squeezed else part
    return published


def _from_published(state: dict[str, Tensor], ours: Iterable[str], names: Names) -> dict[str, Tensor]:
    """Rename and stack; what does not fit keeps its name."""
    left = dict(state)
    found = {}
    for name in ours:
        theirs = names(name)
        if all(official in left for official in theirs):
            parts = [left.pop(official) for official in theirs]
            shapes = {official: tuple(part.shape) for official, part in zip(theirs, parts, strict=True)}
            if len(set(shapes.values())) > 1:
                raise ValueError(f"{name}: its parts must be of one shape, and are in the checkpoint {shapes}.")
            found[name] = (
                parts[0] if len(parts) == 1 else torch.stack([p.squeeze(1) if p.dim() == 3 else p for p in parts])
            )
    return found | left


def checkpoint_filter_fn(
    state_dict: dict[str, Any], model: VisionMamba, names: Names | None = None
) -> dict[str, Tensor]:
    """Make a checkpoint fit a model: published names to ours, patch kernels and position embedding to its sizes.

    Published files with rotations hold their tables; ours are computed, and must be the same.

    Args:
        state_dict: ours or the published one, or a training file that has it under "model" (or "model_ema").
        model: the model to fit, of another patch size or grid if need be.
        names: what the published code calls each of our parameters; as Vim's does by default.

    Returns: a state dict by our names.
    Raises: ValueError naming the tensors that are missing or unused, the classifier's excepted, or such a table.
    """
    state = unwrap(state_dict)
    if model.rope:
        take_out_rotations(state, model)
    names = partial(published_names, class_token=model.class_token) if names is None else names
    if not any(name.startswith("blocks.") for name in state):
        state = _from_published(state, model.state_dict(), names)
    require_all_used(state, model, "head")
    fit_patches(state, model)
    return state


# Published files hold the arguments of their training run too; with this, torch reads them without trusting them.
torch.serialization.add_safe_globals([argparse.Namespace])


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 224 / 256,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
        "paper_ids": "arXiv:2401.09417",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


# The pages of Vim-Ti's and Vim-S's weights name one licence at their head and another in their text.
_TERMS = "licence: non-commercial in the text of its page"

default_cfgs = generate_default_cfgs(
    {
        # Names of files as third parties list them.
        "vim_tiny_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok",
            hf_hub_filename="vim_t_midclstok_76p1acc.pth",
            notes=("top-1 76.1", _TERMS),
        ),
        "vim_tiny_patch16_stride8_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny-midclstok",
            hf_hub_filename="vim_t_midclstok_ft_78p3acc.pth",
            notes=("top-1 78.3", _TERMS),
        ),
        "vim_small_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok",
            hf_hub_filename="vim_s_midclstok_80p5acc.pth",
            notes=("top-1 80.5", _TERMS),
        ),
        "vim_small_patch16_stride8_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-small-midclstok",
            hf_hub_filename="vim_s_midclstok_ft_81p6acc.pth",
            notes=("top-1 81.6", _TERMS),
        ),
        "vim_base_patch16_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-base-midclstok", hf_hub_filename="vim_b_midclstok_81p9acc.pth", notes=("top-1 81.9",)
        ),
        # As first published; of these the authors have released one.
        "vim_tiny_patch16_rope_224.untrained": _cfg(),
        "vim_tiny_patch16_rope_cls_224.hustvl_in1k": _cfg(
            hf_hub_id="hustvl/Vim-tiny", hf_hub_filename="vim_tiny_73p1.pth", notes=("top-1 73.1",)
        ),
        "vim_tiny_patch8_rope_224.untrained": _cfg(),
        "vim_tiny_patch8_rope_cls_224.untrained": _cfg(),
        "vim_small_patch16_rope_224.untrained": _cfg(),
        "vim_base_patch16_rope_224.untrained": _cfg(),
        # Ours.
        "vim_tiny_patch16_steady_224.untrained": _cfg(
            description="Vim with the mean of the patches and bounded scans; not a published model",
        ),
        "test_vim.untrained": _cfg(input_size=(3, 160, 160), crop_pct=0.95),
    }
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    return build(VisionMamba, variant, pretrained, checkpoint_filter_fn, dict(out_indices=3), **kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti: 7.1 M parameters, 1.6 GMACs; 76.1 top-1 as published."""
    return _create_vim("vim_tiny_patch16_224", pretrained, **dict(dict(embed_dim=192), **kwargs))


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti+: Vim-Ti on patches that overlap by half, 7.3 M parameters, 5.8 GMACs; 78.3 top-1 as published."""
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **dict(dict(embed_dim=192, stride=8), **kwargs))


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 25.8 M parameters, 5.4 GMACs; 80.5 top-1 as published."""
    return _create_vim("vim_small_patch16_224", pretrained, **dict(dict(embed_dim=384), **kwargs))


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S+: Vim-S on patches that overlap by half, 26.0 M parameters, 19.9 GMACs; 81.6 top-1 as published."""
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **dict(dict(embed_dim=384, stride=8), **kwargs))


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: 97.6 M parameters, 19.8 GMACs; 81.9 top-1 as published."""
    return _create_vim("vim_base_patch16_224", pretrained, **dict(dict(embed_dim=768), **kwargs))


_ROPE: dict[str, Any] = dict(class_token="none", global_pool="avg", rope=True, average_routes=False)
_ROPE_CLS: dict[str, Any] = dict(_ROPE, class_token="head", global_pool="token")


@register_model
def vim_tiny_patch16_rope_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-Ti as first published: rotated tokens, the mean of the patches, the sum of both ways; without weights."""
    return _create_vim("vim_tiny_patch16_rope_224", pretrained, **dict(dict(_ROPE, embed_dim=192), **kwargs))


@register_model
def vim_tiny_patch16_rope_cls_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """The same with a class token in front; 73.1 top-1 as published."""
    return _create_vim("vim_tiny_patch16_rope_cls_224", pretrained, **dict(dict(_ROPE_CLS, embed_dim=192), **kwargs))


@register_model
def vim_tiny_patch8_rope_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    model_args = dict(_ROPE, embed_dim=192, patch_size=8)
    return _create_vim("vim_tiny_patch8_rope_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vim_tiny_patch8_rope_cls_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    model_args = dict(_ROPE_CLS, embed_dim=192, patch_size=8)
    return _create_vim("vim_tiny_patch8_rope_cls_224", pretrained, **dict(model_args, **kwargs))


@register_model
def vim_small_patch16_rope_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    return _create_vim("vim_small_patch16_rope_224", pretrained, **dict(dict(_ROPE, embed_dim=384), **kwargs))


@register_model
def vim_base_patch16_rope_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    return _create_vim("vim_base_patch16_rope_224", pretrained, **dict(dict(_ROPE, embed_dim=768), **kwargs))


@register_model
def vim_tiny_patch16_steady_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Not published: the mean of the patches, so no token has a place of its own in any grid, and bounded scans."""
    model_args = dict(embed_dim=192, class_token="none", global_pool="avg", norm_columns=True)
    return _create_vim("vim_tiny_patch16_steady_224", pretrained, **dict(model_args, **kwargs))


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A Vim small enough for tests, and for small images with patch_size=4, img_size=32."""
    return _create_vim("test_vim", pretrained, **dict(dict(img_size=160, embed_dim=48, depth=4), **kwargs))


_FIRST = "224_bimambav2_final_pool_mean_abs_pos_embed_rope_also_residual"
_SUFFIX = "224_bimambav2_final_pool_mean_abs_pos_embed_with"
register_model_deprecations(
    __name__,
    {
        f"vim_tiny_patch16_{_SUFFIX}_midclstok_div2": "vim_tiny_patch16_224.hustvl_in1k",
        f"vim_tiny_patch16_stride8_{_SUFFIX}_midclstok_div2": "vim_tiny_patch16_stride8_224.hustvl_in1k",
        f"vim_small_patch16_{_SUFFIX}_midclstok_div2": "vim_small_patch16_224.hustvl_in1k",
        f"vim_small_patch16_stride8_{_SUFFIX}_midclstok_div2": "vim_small_patch16_stride8_224.hustvl_in1k",
        f"vim_base_patch16_{_SUFFIX}_middle_cls_token_div2": "vim_base_patch16_224.hustvl_in1k",
        f"vim_tiny_patch16_{_FIRST}": "vim_tiny_patch16_rope_224",
        f"vim_tiny_patch16_{_FIRST}_with_cls_token": "vim_tiny_patch16_rope_cls_224.hustvl_in1k",
        f"vim_tiny_patch8_{_FIRST}": "vim_tiny_patch8_rope_224",
        f"vim_tiny_patch8_{_FIRST}_with_cls_token": "vim_tiny_patch8_rope_cls_224",
        f"vim_small_patch16_{_FIRST}": "vim_small_patch16_rope_224",
        f"vim_base_patch16_{_FIRST}": "vim_base_patch16_rope_224",
    },
)
