"""Entry points for torch.hub: every model of this repository, by its timm name.

    model = torch.hub.load("<owner>/<repository>", "vmamba_tiny_s1l8", pretrained=True)

`pretrained` and all other arguments are those of `timm.create_model`.
"""

import functools as _functools
from typing import Any as _Any

import timm as _timm
from torch import nn as _nn

import vision_mamba as _vision_mamba

dependencies = ["torch", "timm"]


def _create(name: str, pretrained: bool = False, **kwargs: _Any) -> _nn.Module:
    return _timm.create_model(name, pretrained=pretrained, **kwargs)


def _entry(name: str) -> _Any:
    entry = _functools.partial(_create, name)
    entry.__doc__ = _timm.model_entrypoint(name).__doc__  # what torch.hub.help shows
    return entry


for _name in _timm.list_models(include_tags=False):
    if _timm.model_entrypoint(_name).__module__.startswith(f"{_vision_mamba.__name__}."):
        globals()[_name] = _entry(_name)
