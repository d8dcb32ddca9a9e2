"""Class tokens among patches, and what tells a token its place: resampled position embeddings and rotations."""

from concurrent.futures import ThreadPoolExecutor

import torch
from timm.layers import (
    build_rotary_pos_embed,
    is_exporting,
    register_notrace_function,
    resample_abs_pos_embed,
)
from torch import Tensor, nn

from vision_mamba.constants import Constants

#: Where class tokens stand, and how many they are: among M patches at M // 2, before them, at both ends, or nowhere.
CLASS_TOKENS = {"middle": 1, "head": 1, "double": 2, "none": 0}


@torch.fx.wrap
@register_notrace_function
def resample_pos_embed(
    pos_embed: Tensor, new_size: list[int], old_size: list[int], class_token: str, antialias: bool = True
) -> Tensor:
    """Resample a position embedding to another grid; class tokens keep their rows, at their places in the new sequence.

    Args:
        pos_embed: (1, T, E) in the order of the sequence, T = h w patches and the class tokens if there are any.
        new_size: grid (height, width) wanted.
        old_size: grid (h, w) that pos_embed is for.
        class_token: one of `CLASS_TOKENS`.
        antialias: filter where the new grid is coarser.

    Returns: (1, T', E).
    """
    # An exported graph must not depend on the size it was made with, so there the sizes are not compared.
    if not is_exporting() and new_size[0] == old_size[0] and new_size[1] == old_size[1]:
        return pos_embed
    n = count_class_tokens(class_token)
    first = resample_abs_pos_embed(class_first(pos_embed, class_token), new_size, old_size, n, antialias=antialias)
    return insert_class(first[:, n:], first[:, :n], class_token)


def count_class_tokens(class_token: str) -> int:
    """How many class tokens there are; `CLASS_TOKENS` for TorchScript."""
    if class_token == "none":
        return 0
    return 2 if class_token == "double" else 1


def class_place(class_token: str, height: int, width: int) -> int:
    """Where one class token stands among the patches of a grid; -1 for none."""
    if class_token == "middle":
        return height * width // 2
    return 0 if class_token == "head" else -1


def insert_class(patches: Tensor, token: Tensor, class_token: str) -> Tensor:
    """(B, M, E) patches and (B, n, E) class tokens -> (B, M + n, E), each token at its place."""
    if class_token == "none":
        return patches
    if class_token == "head":
        return torch.cat((token, patches), 1)
    if class_token == "double":
        return torch.cat((token[:, :1], patches, token[:, 1:]), 1)
    place = patches.shape[1] // 2
    first, last = patches.split([place, patches.shape[1] - place], 1)
    return torch.cat((first, token, last), 1)


def class_first(tokens: Tensor, class_token: str) -> Tensor:
    """Undo insert_class, but keep the tokens: (B, M + n, E) -> (B, M + n, E), class tokens before all patches."""
    if class_token == "double":
        return torch.cat((tokens[:, :1], tokens[:, -1:], tokens[:, 1:-1]), 1)
    if class_token != "middle":
        return tokens
    place = (tokens.shape[1] - 1) // 2
    return torch.cat((tokens[:, place : place + 1], tokens[:, :place], tokens[:, place + 1 :]), 1)


def class_alone(tokens: Tensor, class_token: str) -> Tensor:
    """The n class tokens among others: (B, M + n, E) -> (B, n, E)."""
    if class_token == "double":
        return torch.cat((tokens[:, :1], tokens[:, -1:]), 1)
    place = (tokens.shape[1] - 1) // 2 if class_token == "middle" else 0
    return tokens[:, place : place + count_class_tokens(class_token)]


@torch.fx.wrap
@register_notrace_function
def rotation(like: Tensor, size: list[int], old_size: list[int], class_token: str, resample: bool = False) -> Tensor:
    """What turns every token by its place on the grid: rotary embedding, the sine and cosine of each channel's angle.

    Of the E channels, neighbours in pairs turn together, the first half of them by the row and the other by the column.
    Pair j of E / 4 turns by 10000^(-4 j / E) times the row's number, scaled so that the grid has 14 rows; as in EVA-02,
    arXiv:2303.11331. Class tokens are not turned.

    Args:
        like: (..., E) of the device that the result is wanted on.
        size: grid (height, width) of the patches.
        old_size: grid that the model is for.
        class_token: one of `CLASS_TOKENS`.
        resample: take the sines and cosines for the old grid and resample those.

    Returns: float32 (2, L, E).
    """
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing():
            # A trace holds for one size. What it records of the way to this table, ONNX takes for one of more axes;
            # of what another thread does it records nothing.
            sides, ones = [int(side) for side in size], torch.ones(1, int(like.shape[-1]), device=like.device)
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(rotation, ones, sides, old_size, class_token, resample).result()
        if not torch.compiler.is_compiling() and type(like) in (Tensor, nn.Parameter):
            return _rotations.get(like.device, like.shape[-1], tuple(size), tuple(old_size), class_token, resample)
    return _make_rotation(like.shape[-1], size, old_size, class_token, resample, like.device)


def _shared_rotation(
    device: torch.device, dim: int, size: tuple[int, ...], old_size: tuple[int, ...], class_token: str, resample: bool
) -> Tensor:
    # One made under inference mode could not be kept for backward later.
    with torch.inference_mode(False), torch.device(device):
        return _make_rotation(dim, list(size), list(old_size), class_token, resample, device)


_rotations = Constants(_shared_rotation, most=64)


def _make_rotation(
    dim: int, size: list[int], old_size: list[int], class_token: str, resample: bool, device: torch.device
) -> Tensor:
    grid = old_size if resample else size
    reference = [14, 14]  # 224 pixels in patches of 16
    table = torch.stack(build_rotary_pos_embed(grid, dim=dim, in_pixels=False, ref_feat_shape=reference, device=device))
    if resample and not (size[0] == old_size[0] and size[1] == old_size[1]):
        parts = [resample_abs_pos_embed(part[None], size, old_size, 0, antialias=False) for part in table.unbind()]
        table = torch.cat(parts)
    n = count_class_tokens(class_token)
    still = torch.arange(2.0, device=table.device).view(2, 1, 1).expand(2, n, table.shape[2])
    return insert_class(table, still, class_token)
