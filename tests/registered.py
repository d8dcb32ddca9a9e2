"""The models that this package registered with timm: what the tests of models run over."""

from __future__ import annotations

import fnmatch

import timm

import vision_mamba


def is_ours(name: str) -> bool:
    """Whether a model of that name, with or without a tag, comes from this package."""
    return timm.model_entrypoint(name).__module__.startswith(f"{vision_mamba.__name__}.")


def our_models(pattern: str = "*") -> list[str]:
    """Names without tags, deprecated ones left out."""
    return [name for name in timm.list_models(include_tags=False) if is_ours(name) and fnmatch.fnmatch(name, pattern)]


def ends_in_tokens(name: str) -> bool:
    """Whether the model ends in a token sequence and not in a map: its card names no size of a map to pool."""
    return timm.get_pretrained_cfg(name).pool_size is None


ALL = our_models()
SMALL = our_models("test_*")
