"""VMamba: a pyramid of four stages whose token mixer is a selective scan of the map along four routes.

Liu et al. 2024, "VMamba: Visual State Space Model", arXiv:2401.10166. Published code and weights:
https://github.com/MzeroMiko/VMamba (MIT).

Activations are (B, H, W, C) from the stem to the classifier. As everywhere in timm a stage begins with its
downsampling, where the published code ends with it; `checkpoint_filter_fn` renames accordingly. Two more things differ
from the published code on purpose: A_logs, Ds and dt_projs_bias take no weight decay (there all but Ds do), and loading
is strict.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from vision_mamba.layers import SS2D, SSD2D
from vision_mamba.layers.efficient import InvertedBlock, ScanBesideConv
from vision_mamba.layers.joined import (
    chains_on_gpu,
    is_product,
    is_usual_mlp,
    is_usual_norm,
    norm_linear,
    norm_mlp,
    untouched,
    weights_of,
)
from vision_mamba.layers.norm import NORMS, before_product
from vision_mamba.layers.patch import DOWNSAMPLES, STEMS
from vision_mamba.models.checkpoint import rename, require_all_used, unwrap
from vision_mamba.models.pyramid import Pyramid, Stage, build_pyramid, drop_path_rates

__all__ = ["VMamba", "VMambaBlock"]

_log = logging.getLogger(__name__)


class VMambaBlock(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)) where there is an MLP.

    Args:
        dim: C, channels of the map.
        mixer: dim -> token mixer of a (B, H, W, C) map.
        mlp_ratio: hidden width of the MLP over C; 0 for no MLP.
        proj_drop: dropout within the MLP.
        drop_path: stochastic depth of either branch, drawn for each.

    Shape: (B, H, W, C) -> (B, H, W, C).
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[..., nn.Module],
        norm_layer: Callable[..., nn.Module],
        act_layer: type[nn.Module],
        mlp_ratio: float = 4.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = before_product(norm_layer(dim, **dd))
        self.ss2d = mixer(dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.mlp: nn.Module | None = None
        if mlp_ratio > 0:
            self.norm2 = before_product(norm_layer(dim, **dd))
            self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ss2d(self.norm1(x)))
        if self.mlp is not None:
            x = x + self.drop_path2(self.mlp(self.norm2(x)))
        return x

    def joins(self, x: Tensor) -> bool:
        """Whether the norms run with what is before and behind them; see `layers.joined`."""
        mixer = untouched(self.ss2d, SS2D, SSD2D) and is_product(self.ss2d.in_proj)
        mlp = self.mlp is None or (is_usual_mlp(self.mlp) and is_usual_norm(self.norm2))
        return chains_on_gpu(x) and untouched(self, VMambaBlock) and mixer and mlp and is_usual_norm(self.norm1)

    def ahead(self) -> tuple[list[Tensor], list[Tensor]]:
        mixer: Any = self.ss2d
        weights = [mixer.in_proj.weight, *weights_of(self.mlp)]
        if isinstance(mixer, SSD2D):
            return weights, []
        return [*weights, mixer.x_proj_weight, mixer.out_proj.weight], [mixer.A_logs]

    def join(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """As forward, of a stream x + branch, into a stream and what is to be added to it."""
        mixer: Any = self.ss2d
        y, x = norm_linear(x, branch, self.norm1, mixer.in_proj)
        added: Tensor = self.drop_path1(mixer.mix(y))
        if self.mlp is not None:
            added, x = norm_mlp(x, added, self.norm2, self.mlp)
            added = self.drop_path2(added)
        return x, added


def _efficient(dim: int, mixer: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> VMambaBlock:
    return VMambaBlock(dim, partial(ScanBesideConv, scan=mixer), *args, **kwargs)


def _inverted(
    dim: int, mixer: object, norm: object, act: object, mlp_ratio: float, proj_drop: float, drop_path: float, **dd: Any
) -> InvertedBlock:
    return InvertedBlock(dim, drop_path=drop_path, **dd)


#: Blocks by name: the scan alone, EfficientVMamba's with a convolution beside it, or MobileNet's without a scan.
BLOCKS: dict[str, Callable[..., nn.Module]] = {"scan": VMambaBlock, "efficient": _efficient, "inverted": _inverted}


class VMamba(Pyramid):
    """VMamba as an image classifier or feature pyramid, for images of any size.

    Args:
        img_size: nominal image size, recorded for data configurations; every size runs whatever it is.
        patch_size: reduction of the stem.
        in_chans: channels of the image.
        num_classes: width of the classifier; 0 for none.
        global_pool: pooling before the classifier; '' for none.
        dims: C, channels of each stage.
        depths: blocks of each stage.
        block: "scan", "efficient" or "inverted", see `BLOCKS`, or one of them for every stage.
        ssd: scan by state-space duality, as Mamba-2 does: heads with one decay each, `SSD2D` rather than `SS2D`.
        d_state: N, states of a channel of the scan.
        ssm_ratio: inner width of the mixer over C.
        dt_rank: R, rank of the step sizes, or the heads; C / 16 rounded up by default.
        d_conv: side of the mixer's depthwise convolution; 1 for none.
        ssm_conv_bias: give that convolution a bias.
        gate: gate the mixer's result, as in the first version.
        ssm_act_layer: name of the mixer's activation, timm's.
        scan_order: name of a registered `ScanOrder`, or one for every block.
        route_attention: add the routes up by attention to their channels, as in LocalMamba.
        average_routes: take the mean of the routes, not the sum.
        norm_columns: bound what drives the scan by a norm, see `SS2D`.
        published_quirks: misplace results of columns unless the map is square, as LocalMamba's published code does.
        mlp_ratio: hidden width of the MLP over C; 0 for blocks without MLP, as in the first version.
        stem: "overlap" for two overlapping convolutions, "patch" for one that does not overlap.
        downsample: "overlap" for convolutions of 3 x 3, "patch" for 2 x 2, "merge" for Swin's patch merging.
        norm_layer: name of the norm, timm's.
        norm_eps: epsilon of all norms.
        act_layer: name of the activation of stem and MLP, timm's.
        drop_rate: dropout before the classifier.
        proj_drop_rate: dropout within mixers and MLPs.
        published_weight_decay: let weight decay reach what the published training's reached, see `no_weight_decay`.
        drop_path_rate: stochastic depth of the last block, growing linearly from 0.

    Shape: (B, in_chans, H, W) -> (B, num_classes).
    Raises: ValueError for an unknown stem, downsampling or scan order.
    Reference: Liu et al. 2024, arXiv:2401.10166.

    >>> import timm
    >>> timm.create_model("test_vmamba", num_classes=10)(torch.randn(1, 3, 33, 65)).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 8, 2),
        block: str | Sequence[str] = "scan",
        ssd: bool = False,
        d_state: int = 1,
        ssm_ratio: float = 1.0,
        dt_rank: int | None = None,
        d_conv: int = 3,
        ssm_conv_bias: bool = False,
        ssm_act_layer: str = "silu",
        gate: bool = False,
        scan_order: str | Sequence[str] = "cross",
        route_attention: bool = False,
        average_routes: bool = False,
        norm_columns: bool = False,
        published_quirks: bool = False,
        published_weight_decay: bool = False,
        mlp_ratio: float = 4.0,
        stem: str = "overlap",
        downsample: str = "overlap",
        norm_layer: str = "layernorm",
        norm_eps: float = 1e-5,
        act_layer: str = "gelu",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm = partial(NORMS.get(norm_layer) or get_norm_layer(norm_layer), eps=norm_eps)
        act = get_act_layer(act_layer)
        make_stem = _choose("stem", stem, STEMS)
        make_downsample = _choose("downsample", downsample, DOWNSAMPLES)
        if len(dims) != len(depths):
            raise ValueError(f"VMamba: dims and depths must name as many stages, got {len(dims)} and {len(depths)}.")
        names = [block] * len(dims) if isinstance(block, str) else block
        if len(names) != len(dims):
            raise ValueError(f"VMamba: block must be one name or one for each of the {len(dims)} stages, got {block}.")
        make_blocks = [_choose("block", name, BLOCKS) for name in names]
        orders = [scan_order] * sum(depths) if isinstance(scan_order, str) else list(scan_order)
        if len(orders) != sum(depths):
            raise ValueError(
                f"VMamba: scan_order must be one name or one for each of the {sum(depths)} blocks, got {len(orders)}."
            )
        mixer = partial(
            SSD2D if ssd else SS2D,
            d_state=d_state,
            ssm_ratio=ssm_ratio,
            dt_rank=dt_rank,
            d_conv=d_conv,
            conv_bias=ssm_conv_bias,
            act_layer=get_act_layer(ssm_act_layer),
            gate=gate,
            route_attention=route_attention,
            average=average_routes,
            norm_columns=norm_columns,
            published_quirks=published_quirks,
            norm_eps=norm_eps,
            proj_drop=proj_drop_rate,
        )
        first = make_stem(in_chans, dims[0], patch_size, norm, act, **dd)
        stages = []
        rates = drop_path_rates(drop_path_rate, depths)
        for i, (dim, stage_rates) in enumerate(zip(dims, rates, strict=True)):
            between = make_downsample(dims[i - 1], dim, norm_layer=norm, **dd) if i else nn.Identity()
            blocks = [
                make_blocks[i](
                    dim, partial(mixer, scan_order=orders.pop(0)), norm, act, mlp_ratio, proj_drop_rate, rate, **dd
                )
                for rate in stage_rates
            ]
            stages.append(Stage(between, blocks))
        super().__init__(
            first,
            stages,
            norm(dims[-1], **dd),
            dims,
            patch_size,
            in_chans,
            num_classes,
            global_pool,
            drop_rate,
            img_size,
            **dd,
        )
        self.published_weight_decay = published_weight_decay

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """The published training left nothing out but vectors, which are left out anyhow."""
        return set() if self.published_weight_decay else {"*.A_logs", "*.Ds", "*.dt_projs_bias"}


def _choose(argument: str, name: str, known: Mapping[str, Callable[..., nn.Module]]) -> Callable[..., nn.Module]:
    if name not in known:
        raise ValueError(f"VMamba: {argument} must be one of {', '.join(known)}; got {name!r}.")
    return known[name]


# Our names -> those of the published code, applied in this order; the only place where they meet.
_PUBLISHED_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^stem\.conv1\.", "patch_embed.0."),
    (r"^stem\.norm1\.", "patch_embed.2."),
    (r"^stem\.conv2\.", "patch_embed.5."),
    (r"^stem\.norm2\.", "patch_embed.7."),
    (r"^stages\.(\d+)\.downsample\.", lambda stage: f"layers.{int(stage[1]) - 1}.downsample."),
    (r"^stages\.", "layers."),
    (r"\.downsample\.conv\.", ".downsample.1."),
    (r"\.downsample\.norm\.", ".downsample.3."),
    (r"\.downsample\.pre_norm\.", ".downsample.norm."),
    (r"\.norm1\.", ".norm."),
    (r"\.ss2d\.attn\.", ".ss2d.multi_scan.attn."),
    (r"\.ss2d\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.fc\.", "classifier.head."),
)

# Other published spellings of a name -> the one above: the code of January 2024, then the single-file edition.
_OLDER_NAMES: tuple[tuple[str, Any], ...] = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
    (r"\.op\.(x_proj|dt_projs)\.weight$", r".op.\1_weight"),
    (r"\.downsample\.1\.", ".downsample.norm."),
    (r"\.downsample\.2\.", ".downsample.reduction."),
)


# Scans by duality keep their convolution in a sequence.
_PUBLISHED_DUAL_NAMES = (*_PUBLISHED_NAMES, (r"\.conv2d\.", ".conv2d.1."))


def _names_for(own: Iterable[str]) -> tuple[tuple[str, Any], ...]:
    """The rules for a model with those parameters."""
    return _PUBLISHED_NAMES if any(name.endswith("dt_projs_weight") for name in own) else _PUBLISHED_DUAL_NAMES


def to_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our state dict into what the published code loads; the inverse of checkpoint_filter_fn."""
    rules = _names_for(state_dict)
    return {rename(name, rules): tensor for name, tensor in state_dict.items()}


def checkpoint_filter_fn(
    state_dict: dict[str, Any],
    model: Pyramid,
    to_published: Callable[[dict[str, Any]], dict[str, Any]] = to_published,
) -> dict[str, Tensor]:
    """A checkpoint as this model names it: our own as they are, published ones renamed, in any of their spellings.

    Reads training files ("model", else "state_dict" or "model_ema"), backbones of detectors and segmenters of the
    MM libraries, 1x1 convolutions for projections.

    Args:
        state_dict: what `torch.load` gave.
        model: the model to fit.
        to_published: renames as the published code of the model's family does.

    Raises: ValueError naming the tensors that are missing or unused, the classifier's excepted.
    """
    own = model.state_dict()
    (norm,) = to_published({"norm.": None})
    state = _backbone(unwrap(state_dict), len(model.stages), norm)
    if not any(name.startswith("stages.") for name in state):
        classifier = ("head.fc.weight", "head.fc.bias")  # known by name to a model without classes too
        names = to_published({name: name for name in (*own, *classifier)})
        renamed = {}
        for name, tensor in state.items():
            ours = names.get(name if name in names else rename(name, _OLDER_NAMES), name)
            renamed[ours] = _reshaped(tensor, own[ours]) if ours in own else tensor
        state = renamed
    require_all_used(state, model, "head.fc")
    return state


def _backbone(state: dict[str, Tensor], stages: int, norm: str) -> dict[str, Tensor]:
    """What is the backbone's, where it is part of a detector or segmenter."""
    prefix = "backbone."
    if not any(name.startswith(prefix) for name in state):
        return state
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    # There each feature has a norm. The last one's stands where ours stands before the classifier.
    last = f"outnorm{stages - 1}."
    left_out = [name for name in state if name.startswith("outnorm") and not name.startswith(last)]
    if left_out:
        _log.warning("backbone of a detector or segmenter: left out %s, which the classifier has not", left_out)
    return {name.replace(last, norm): state[name] for name in state if name not in left_out}


def _reshaped(tensor: Tensor, like: Tensor) -> Tensor:
    """A 1x1 convolution as a projection, and all routes' projections stacked as one a route; else as it is."""
    if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) and tensor.shape[:2] == like.shape:
        return tensor.flatten(1)
    if like.dim() == 3 and tensor.shape == like.flatten(0, 1).shape:
        return tensor.reshape(like.shape)
    return tensor


# Training files hold their settings in a mapping class of a library that nothing else here needs. The plain mapping in
# its place lets torch read those files without trusting them, and without that library.
torch.serialization.add_safe_globals([(OrderedDict, "yacs.config.CfgNode")])


def _cfg(url: str = "", top1: str | None = None, **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv1",
        "classifier": "head.fc",
        "license": "mit",
        "paper_name": "VMamba: Visual State Space Model",
        "paper_ids": "arXiv:2401.10166",
        "origin_url": "https://github.com/MzeroMiko/VMamba",
        "notes": top1 and (f"top-1 {top1}",),
        **kwargs,
    }


_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"

default_cfgs = generate_default_cfgs(
    {
        "vmamba_tiny_s1l8.in1k": _cfg(_RELEASES + "%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth", "82.6"),
        "vmamba_tiny_s2l5.in1k": _cfg(_RELEASES + "%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth", "82.5"),
        "vmamba_small_s2l15.in1k": _cfg(_RELEASES + "%23v2cls/vssm_small_0229_ckpt_epoch_222.pth", "83.6"),
        "vmamba_small_s1l20.in1k": _cfg(_RELEASES + "%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth", "83.3"),
        "vmamba_base_s2l15.in1k": _cfg(_RELEASES + "%23v2cls/vssm_base_0229_ckpt_epoch_237.pth", "83.9"),
        "vmamba_base_s1l20.in1k": _cfg(_RELEASES + "%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth", "83.8"),
        "vmamba_tiny_v1.in1k": _cfg(_RELEASES + "%2320240220/vssmtiny_dp02_ckpt_epoch_258.pth", "82.5"),
        "vmamba_tiny_v0.in1k": _cfg(_RELEASES + "%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth", "82.2"),
        "vmamba_small_v0.in1k": _cfg(_RELEASES + "%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth", "83.5"),
        "vmamba_base_v0.in1k": _cfg(_RELEASES + "%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth", "83.7"),
        # Of less stochastic depth and without averaging: what the published detectors and segmenters began with.
        "vmamba_base_v0.dp05_in1k": _cfg(_RELEASES + "%2320240218/vssmbase_dp05_ckpt_epoch_260.pth", "83.2"),
        # Never trained by the authors.
        "vmamba_tiny_m2.untrained": _cfg(),
        "vmamba_small_m2.untrained": _cfg(),
        "vmamba_base_m2.untrained": _cfg(),
        # Ours.
        "vmamba_tiny_steady.untrained": _cfg(
            description="VMamba with the mean of the routes and bounded scans; not a published model",
            license="apache-2.0",
        ),
        "test_vmamba.untrained": _cfg(input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95, license="apache-2.0"),
        "test_vmamba_m2.untrained": _cfg(
            input_size=(3, 160, 160), pool_size=(5, 5), crop_pct=0.95, license="apache-2.0"
        ),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    return build_pyramid(VMamba, variant, pretrained, checkpoint_filter_fn, **kwargs)


_BASE = dict(dims=(128, 256, 512, 1024))
_V0 = dict(d_state=16, ssm_ratio=2.0, ssm_conv_bias=True, gate=True, mlp_ratio=0.0, stem="patch", downsample="merge")
_M2 = dict(ssd=True, d_state=64, ssm_ratio=1.0, ssm_act_layer="gelu")


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T of the paper's main table."""
    model_args = dict(depths=(2, 2, 8, 2), ssm_ratio=1.0)
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(depths=(2, 2, 5, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S of the paper's main table."""
    model_args = dict(depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_small_s2l15", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(depths=(2, 2, 20, 2), ssm_ratio=1.0)
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B of the paper's main table."""
    model_args = dict(_BASE, depths=(2, 2, 15, 2), ssm_ratio=2.0)
    return _create_vmamba("vmamba_base_s2l15", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(_BASE, depths=(2, 2, 20, 2), ssm_ratio=1.0)
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_v1(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T(0220), the second generation: one state, a gate and MLPs; 82.5 top-1 as published."""
    model_args = dict(depths=(2, 2, 4, 2), ssm_ratio=2.0, gate=True)
    return _create_vmamba("vmamba_tiny_v1", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Vanilla VMamba-T, the first version: 16 states, a gate, no MLP."""
    model_args = dict(_V0, depths=(2, 2, 9, 2))
    return _create_vmamba("vmamba_tiny_v0", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(_V0, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_small_v0", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(_V0, **_BASE, depths=(2, 2, 27, 2))
    return _create_vmamba("vmamba_base_v0", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T on Mamba-2's scan: 64 states, heads of 16 channels; in the published code, without weights."""
    model_args = dict(_M2, depths=(2, 2, 4, 2))
    return _create_vmamba("vmamba_tiny_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_small_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(_M2, depths=(2, 2, 12, 2))
    return _create_vmamba("vmamba_small_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_base_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    model_args = dict(_M2, **_BASE, depths=(2, 2, 12, 2))
    return _create_vmamba("vmamba_base_m2", pretrained, **dict(model_args, **kwargs))


@register_model
def vmamba_tiny_steady(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Not published: `vmamba_tiny_s1l8` with the mean of the routes and with scans that no activation drives far."""
    model_args = dict(depths=(2, 2, 8, 2), average_routes=True, norm_columns=True)
    return _create_vmamba("vmamba_tiny_steady", pretrained, **dict(model_args, **kwargs))


@register_model
def test_vmamba(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """Small enough for tests and for training on a CPU in minutes."""
    model_args = dict(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), mlp_ratio=2.0)
    return _create_vmamba("test_vmamba", pretrained, **dict(model_args, **kwargs))


@register_model
def test_vmamba_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The same on Mamba-2's scan."""
    model_args = dict(_M2, dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), d_state=8, mlp_ratio=2.0)
    return _create_vmamba("test_vmamba_m2", pretrained, **dict(model_args, **kwargs))


# Sizes stand for the configurations of the paper's main table; then the published factories' and run names.
register_model_deprecations(
    __name__,
    {
        "vmamba_tiny": "vmamba_tiny_s1l8",
        "vmamba_small": "vmamba_small_s2l15",
        "vmamba_base": "vmamba_base_s2l15",
        "vssm_tiny": "vmamba_tiny_v0",
        "vssm_small": "vmamba_small_v0",
        "vssm_base": "vmamba_base_v0",
        "vssm1_tiny_0220": "vmamba_tiny_v1",
        "vssm1_tiny_0230s": "vmamba_tiny_s1l8",
        "vssm_tiny_0230": "vmamba_tiny_s2l5",
        "vssm_small_0229": "vmamba_small_s2l15",
        "vssm_base_0229": "vmamba_base_s2l15",
        "vssm1_tiny_0230": "vmamba_tiny_s2l5",
        "vssm1_small_0229": "vmamba_small_s2l15",
        "vssm1_small_0229s": "vmamba_small_s1l20",
        "vssm1_base_0229": "vmamba_base_s2l15",
        "vssm1_base_0229s": "vmamba_base_s1l20",
        "vanilla_vmamba_tiny": "vmamba_tiny_v0",
        "vanilla_vmamba_small": "vmamba_small_v0",
        "vanilla_vmamba_base": "vmamba_base_v0",
    },
)
