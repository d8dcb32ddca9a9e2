"""Pytest plugin: timm's own tests/test_models.py, unmodified, on the models of this package.

That file builds its parameter lists from `timm.list_models` while it is imported. The plugin is loaded before
(`pytest -p timm_ext`) and puts a stand-in there which names our models alone; what belongs to other models is
deselected. tools/test_timm.py brings the file of the installed timm version and runs it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

import pytest
import timm
from registered import ends_in_tokens, is_ours, our_models  # this folder is on the path where the plugin is loaded

_list_models = timm.list_models
_chosen = "*"
_weights = False


def _with_ours(patterns: str | Iterable[str]) -> list[str]:
    """Name patterns as a list; where they are timm's list of its token models, ours are added."""
    names = [patterns] * bool(patterns) if isinstance(patterns, str) else list(patterns)
    return names + [name for name in our_models() if ends_in_tokens(name)] if "vit_*" in names else names


def list_models(
    filter: str | Iterable[str] = "",
    module: str | Iterable[str] = "",
    pretrained: bool = False,
    exclude_filters: str | Iterable[str] = "",
    **options: Any,
) -> list[str]:
    """`timm.list_models` for our models alone; a list of timm's modules stands for "all that have the feature"."""
    if pretrained and not _weights:
        return []
    names = _list_models(_with_ours(filter), "", pretrained, _with_ours(exclude_filters), **options)
    return [name for name in names if is_ours(name) and fnmatch.fnmatch(name.split(".")[0], _chosen)]


def list_pretrained(filter: str | Iterable[str] = "", exclude_filters: str | Iterable[str] = "") -> list[str]:
    return list_models(filter, pretrained=True, exclude_filters=exclude_filters, include_tags=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--models", default="*", help="run the models whose name matches this pattern, e.g. 'test_*'")
    parser.addoption("--weights", action="store_true", help="run the tests that download published weights too")


def pytest_configure(config: pytest.Config) -> None:
    global _chosen, _weights
    _chosen, _weights = config.getoption("--models"), config.getoption("--weights")
    timm.list_models, timm.list_pretrained = list_models, list_pretrained


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def concerns_us(item: pytest.Item) -> bool:
        callspec = getattr(item, "callspec", None)
        name = callspec.params.get("model_name") if callspec else None
        return isinstance(name, str) and timm.is_model(name) and is_ours(name)

    others = [item for item in items if not concerns_us(item)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if concerns_us(item)]
