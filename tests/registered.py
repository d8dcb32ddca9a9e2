"""The models that this package registered with timm: what the tests of models run over."""

from __future__ import annotations

import fnmatch
import sys
from types import ModuleType

import timm

import vision_mamba
from vision_mamba.models import vmamba


def is_ours(name: str) -> bool:
    """Whether a model of that name, with or without a tag, comes from this package."""
    return timm.model_entrypoint(name).__module__.startswith(f"{vision_mamba.__name__}.")


def our_models(pattern: str = "*") -> list[str]:
    """Names without tags, deprecated ones left out."""
    return [name for name in timm.list_models(include_tags=False) if is_ours(name) and fnmatch.fnmatch(name, pattern)]


def ends_in_tokens(name: str) -> bool:
    """Whether the model ends in a token sequence and not in a map: its card names no size of a map to pool."""
    card = timm.get_pretrained_cfg(name)
    assert card is not None, name
    return card.pool_size is None


def family(name: str) -> ModuleType:
    """The module whose `to_published` and `checkpoint_filter_fn` are for the model of that name."""
    return vmamba if "localvmamba" in name else sys.modules[timm.model_entrypoint(name).__module__]


ALL = our_models()
SMALL = our_models("test_*")
