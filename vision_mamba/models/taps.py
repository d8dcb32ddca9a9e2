"""Which maps a model is asked for, and in which order it gives them."""

import torch
from timm.models._features import feature_take_indices
from torch import Tensor


def take_indices(levels: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """Levels to tap, as asked for: timm's rules, but that none at all is an error.

    Args:
        levels: how many there are.
        indices: some of them, negative ones from the end; the last n if a number, all if None.

    Returns: non-negative indices in the order asked for, and the largest.
    Raises: ValueError for no index, AssertionError for one out of range.
    """
    if not torch.jit.is_scripting() and isinstance(indices, (list, tuple)) and not indices:
        raise ValueError(
            "indices of the maps to take (out_indices) are empty; name some, the last n by a number, or None for all."
        )
    return feature_take_indices(levels, indices)


def in_asked_order(taps: list[Tensor], indices: list[int]) -> list[Tensor]:
    """Maps of ascending levels, each once -> those of `indices`, as the list of features has them."""
    ascending = sorted(indices)
    places: list[int] = []
    for i, index in enumerate(ascending):
        if i == 0 or index != ascending[i - 1]:
            places.append(index)
    return [taps[places.index(index)] for index in indices]
