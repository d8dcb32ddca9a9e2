"""Every family's models are built here, by timm, which also fetches and loads their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import nn


def build(
    model: type[nn.Module],
    variant: str,
    pretrained: bool,
    filter_fn: Callable[..., Any],
    features: dict[str, Any],
    **kwargs: Any,
) -> Any:
    """timm's builder, which says in one sentence what to do where weights cannot be had.

    Args:
        model: class to build.
        variant: registered name.
        pretrained: load the weights that its card names.
        filter_fn: makes a checkpoint fit the model.
        features: what `features_only=True` gives by default, as timm's feature_cfg.
        **kwargs: for the model, and what timm takes from among them.

    Raises: ConnectionError if the weights cannot be fetched, FileNotFoundError if they are not where the card says.
    """
    features = dict(features, feature_cls="getter")
    if "out_indices" in kwargs:
        features["out_indices"] = kwargs.pop("out_indices")
    try:
        return build_model_with_cfg(
            model, variant, pretrained, pretrained_filter_fn=filter_fn, feature_cfg=features, **kwargs
        )
    except OSError as error:  # what urllib, torch.hub and the hub's client raise derives from it
        card = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"))
        if not pretrained:
            raise
        if card.file:
            raise FileNotFoundError(f"{variant}: no weights at {card.file}.") from error
        source = card.url or f"{card.hf_hub_filename} of https://huggingface.co/{card.hf_hub_id}"
        told = str(error).rstrip(".")
        raise ConnectionError(
            f"{variant}: its weights could not be fetched, {source}: {told}. Fetch that file where there is a network "
            f"and load it by pretrained_cfg_overlay=dict(file=...), or take pretrained=False for random weights."
        ) from error
