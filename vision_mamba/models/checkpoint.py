"""Checkpoints as they come, whole or not at all: what every family's `checkpoint_filter_fn` does first and last."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from vision_mamba.text import shortened

# Where files keep the weights; the first found wins. Published ones that hold both have the averaged ones in "model".
_KEYS = ("model", "state_dict", "model_ema", "state_dict_ema")


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict in a training file or the state dict itself, free of what wrappers put before its names."""
    state = next((checkpoint[key] for key in _KEYS if isinstance(checkpoint.get(key), Mapping)), checkpoint)
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): tensor for name, tensor in state.items()}


def rename(name: str, rules: Iterable[tuple[str, Any]]) -> str:
    """Apply rules, each a pattern and its replacement as for `re.sub`, one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def require_all_used(state: Mapping[str, Tensor], model: nn.Module, *excepted: str) -> None:
    """Raise ValueError naming the first tensors that the model misses in a state dict or has no place for, if any.

    timm itself does not look where the number of classes differs, and would leave weights at random without a word.

    Args:
        excepted: modules that timm decides on, such as the classifier, for which any number of classes will do.
    """

    def concerned(name: str) -> bool:
        return not name.startswith(tuple(f"{module}." for module in excepted))

    own = model.state_dict()
    missing = [name for name in own if name not in state and concerned(name)]
    unused = [name for name in state if name not in own and concerned(name)]
    if missing or unused:
        raise ValueError(
            f"{type(model).__name__}: the checkpoint does not fit this model, nothing was loaded; "
            f"{_counted(missing)} missing, {_counted(unused)} not used. "
            f"Create the model under the name and with the arguments that the weights were made with."
        )


def _counted(names: list[str]) -> str:
    return f"{len(names)} ({shortened(names)})" if names else "none"
