"""Models by name, with the errors that a command line deserves."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import resolve_model_input_args
from torch import nn

import vision_mamba.models  # noqa: F401  registers this package's models with timm
from vision_mamba.text import nearest, shortened
from vision_mamba.train import checkpoint
from vision_mamba.train.errors import CheckpointError, ConfigError
from vision_mamba.train.options import Config

HEADS = ("head.fc.weight", "classifier.head.weight", "head.head.weight", "head.weight", "fc.weight")  # of many authors
_ALWAYS = ("num_classes", "pretrained", "pretrained_cfg_overlay")
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


def check_name(name: str, where: str = "--model") -> None:
    """Raises: ConfigError naming the nearest registered model if this one, or weights of that tag, are unknown."""
    if name.startswith(_SOURCES):
        return
    architecture = name.split(".")[0]
    if timm.is_model(architecture):
        try:
            timm.get_pretrained_cfg(name)
        except RuntimeError as error:
            known = timm.list_models(f"{architecture}.*", include_tags=True)
            raise ConfigError(f"{where} {name!r}: {error} There are: {shortened(known)}.") from error
        return
    close = nearest(name, timm.list_models())
    raise ConfigError(
        f"{where} {name!r} is not a registered model; did you mean {close!r}? timm.list_models() has all."
    )


def register(modules: Iterable[str]) -> None:
    """Import modules that register further models with timm.

    Raises: ConfigError if one cannot be imported.
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ConfigError(f"--device-modules {module} cannot be imported: {error}.") from error


def create(config: Config, num_classes: int) -> nn.Module:
    """The model of a run, with random, published or given weights.

    Raises: ConfigError for a name or an argument that does not exist; CheckpointError if given weights do not fit.
    """
    check_name(config.model)
    arguments: dict[str, Any] = {"num_classes": config.num_classes or num_classes}
    arguments |= {"drop_rate": config.drop, "drop_path_rate": config.drop_path, "pretrained": config.pretrained}
    arguments |= {"global_pool": config.gp} | (config.model_kwargs or {})
    if config.initial_checkpoint is not None:
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": source(config.model, config.initial_checkpoint)}
    return build(config.model, config.plain(), arguments, config.initial_checkpoint)


def teacher(config: Config, student: nn.Module) -> nn.Module | str | None:
    """Who teaches: a model with the weights of a file, the name of one with published weights, or nobody.

    Raises: ConfigError, CheckpointError as for the student.
    """
    name, path = config.kd_model_name, config.kd_checkpoint
    if name is None:
        return None
    check_name(name, "--kd-model-name")
    if path is None:
        return name
    arguments: dict[str, Any] = {"num_classes": student.num_classes, "in_chans": student.in_chans}
    arguments |= {"pretrained": True, "pretrained_cfg_overlay": source(name, path)}
    return build(name, {"img_size": config.img_size}, arguments, path)


def source(name: str, path: str) -> dict[str, Any]:
    """What timm must know of a file of weights; it keeps the classifier if that has as many outputs as are wanted.

    Raises: CheckpointError if the file holds no weights.
    """
    state_dict = checkpoint.weights(checkpoint.read(path), path)
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    heads = ([] if known is None else [f"{known.classifier}.weight"]) + list(HEADS)
    head = next((state_dict[key] for key in heads if key in state_dict), None)
    return {"file": path} | ({} if head is None else {"num_classes": head.shape[0]})


def build(name: str, options: dict[str, Any], arguments: dict[str, Any], weights: str | None = None) -> nn.Module:
    """`timm.create_model` with img_size and in_chans of the options carried to models that are built for one size."""
    sizes = {key: options.get(key) for key in ("img_size", "in_chans")}
    try:
        return timm.create_model(**resolve_model_input_args(name, sizes, **arguments))
    except (AssertionError, AttributeError, TypeError) as error:
        if "unexpected keyword" in str(error):
            raise ConfigError(f"--model-kwargs: model {name!r} takes no such argument: {error}.") from error
        given = {key: value for key, value in arguments.items() if value is not None and key not in _ALWAYS}
        if not given:
            raise
        raise ConfigError(f"model {name!r} cannot be built with {given}: {error}.") from error
    except OSError as error:
        told = textwrap.shorten(str(error), 300, placeholder=" ...")
        raise CheckpointError(f"weights of model {name!r} cannot be had: {told}") from error
    except (ValueError, RuntimeError) as error:
        if weights is not None:
            told = textwrap.shorten(str(error), 600, placeholder=" ...")
            raise CheckpointError(f"checkpoint {weights} does not fit model {name!r}: {told}") from error
        if "No pretrained weights exist" in str(error):
            raise ConfigError(
                f"--model {name}: no weights of it can be downloaded; name a file, by --initial-checkpoint of "
                "tools/train.py, --weights of tools/validate.py or --checkpoint of tools/predict.py."
            ) from error
        if isinstance(error, RuntimeError):
            raise
        raise ConfigError(f"--model {name}: {error}") from error  # timm's own: sizes that contradict each other


def data_config(model: nn.Module, options: dict[str, Any]) -> dict[str, Any]:
    """input_size, mean, std, interpolation and crop for a model, those given in the options first.

    Raises: ConfigError if the model cannot take them.
    """
    keys = ("img_size", "in_chans", "model_kwargs", "mean", "std", "interpolation", "crop_pct")
    try:
        resolved = resolve_input_data_config(model, {key: options.get(key) for key in keys})
    except ValueError as error:
        raise ConfigError(f"--img-size, --in-chans, --mean, --std: {error}") from error
    return {key: list(value) if isinstance(value, tuple) else value for key, value in resolved.items()}


def device(name: str | None, index: int | None = None) -> torch.device:
    """The device of this name, or the accelerator if there is one.

    Args:
        index: of the device among those of its type, where several processes have one each.

    Raises: ConfigError if this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        chosen = torch.device(name or accelerator or "cpu")
        if index is not None and chosen.type != "cpu":
            chosen = torch.device(chosen.type, index)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        has = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ConfigError(f"--device {name} cannot be used here; this machine has {has}. {error}") from error
    return chosen
