"""What tells torch.compile's caches on disk apart, beside the graph that they know.

A compiled graph holds what fake implementations promised: which backend runs, and the shapes of what it saves for the
backward pass. Another version of this library, another backend that is asked for or has become available promise
something else. Torch has a tag for that in all of these caches' keys, and looks at it after fake tensors have run: but
not where a backward pass is compiled late, in a thread of its own. Its graph names the backend, and the shapes of what
was saved are those of its inputs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.compiler.config

from vision_mamba.ops import registry

Fake = TypeVar("Fake", bound=Callable[..., Any])
_ours: set[str] = set()  # what tags have had of us; a tag is a thread's own in some versions of torch


def tagging(fake: Fake) -> Fake:
    """The fake implementation of an operator, which brings the tag up to date before it answers."""

    @functools.wraps(fake)
    def tagged(*arguments: Any, **options: Any) -> Any:
        _bring_up_to_date()
        return fake(*arguments, **options)

    return tagged  # type: ignore[return-value]


def _bring_up_to_date() -> None:
    wanted = f" vision_mamba-{_decisive(registry.forced())}"
    tag = torch.compiler.config.cache_key_tag
    if wanted in tag:
        return
    for before in list(_ours):
        tag = tag.replace(before, "")
    _ours.add(wanted)
    torch.compiler.config.cache_key_tag = tag + wanted


@functools.cache
def _decisive(forced: str | None) -> str:
    """A hash of this library's operators and of what they can choose from, which stays for the life of a process."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py"))]
    return hashlib.sha256(b"".join([*sources, repr((forced, registry.choices())).encode()])).hexdigest()[:16]
