"""A checkpoint of anyone's as a folder that timm loads: model.safetensors and config.json."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from vision_mamba.models.checkpoint import unwrap
from vision_mamba.text import shortened
from vision_mamba.train import checkpoint
from vision_mamba.train import model as models
from vision_mamba.train.errors import CheckpointError, ConfigError

#: What a model's folder holds, and may be replaced with it.
_FILES = {"config.json", "model.safetensors", "pytorch_model.bin", "README.md", ".gitattributes"}


@dataclass(frozen=True)
class Source:
    """What a checkpoint says of itself.

    Args:
        weights: free of what wrappers put around and before their names. name: of the model.
        arguments: of its constructor. classes: their names, or None. data_config: the preprocessing, or None.
    """

    path: Path
    weights: dict[str, Tensor]
    name: str
    arguments: dict[str, Any]
    classes: list[str] | None
    data_config: dict[str, Any] | None


def read(path: Path, name: str | None, ema: bool, trust: bool, arguments: Mapping[str, Any]) -> Source:
    """Read a checkpoint of tools/train.py, of a family's authors, or of timm.

    Args:
        name: the registered model, where the file does not say it. arguments: of its constructor, beside what it says.
        ema: take the averaged weights. trust: let the file bring Python objects, which may run code.

    Raises: CheckpointError, ConfigError.
    """
    content = checkpoint.read(path, trust)
    options = content.get("args")
    options = options if isinstance(options, dict) else {}
    name = name or (content.get("arch") if isinstance(content.get("arch"), str) else None)
    if name is None:
        raise ConfigError(f"{path} does not say which model it is of; pass --model NAME.")
    models.check_name(name)
    average = next((content[key] for key in ("state_dict_ema", "model_ema") if content.get(key) is not None), None)
    if ema and average is None:
        raise CheckpointError(
            f"{path} holds no averaged weights; its entries are {', '.join(map(str, content))[:200]}."
        )
    weights = unwrap(average if ema else content)  # type: ignore[arg-type]
    strange = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if strange or not weights:
        raise CheckpointError(
            f"{path} holds no weights, or more: {', '.join(map(str, strange))[:200] or 'it is empty'}."
        )
    sizes = {key: options[key] for key in ("img_size", "in_chans") if options.get(key) is not None}
    found = next((weights[key].shape[0] for key in models.HEADS if key in weights), None)
    classes = content.get("classes")
    return Source(
        path,
        {key: value.detach().contiguous().clone() for key, value in weights.items()},
        name,
        {
            **({} if found is None else {"num_classes": found}),
            **sizes,
            **(options.get("model_kwargs") or {}),
            **arguments,
        },
        classes if isinstance(classes, list) else None,
        content.get("data_config"),
    )


def build(source: Source) -> nn.Module:
    """The model with the weights of a source, all of them and no others.

    Raises: CheckpointError that names tensors which are missing or left over.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        safetensors.torch.save_file(source.weights, file)
        arguments = dict(source.arguments)
        sizes: dict[str, Any] = {key: arguments.pop(key) for key in ("img_size", "in_chans") if key in arguments}
        overlay: dict[str, Any] = {"file": str(file)}
        if "num_classes" in arguments:
            overlay["num_classes"] = arguments["num_classes"]
        if "in_chans" in sizes:
            known = timm.get_pretrained_cfg(source.name, allow_unregistered=True)
            side = known.input_size[1:] if known is not None else (224, 224)
            overlay["input_size"] = (sizes["in_chans"], *side)
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
        try:
            model = models.build(source.name, sizes, arguments, str(source.path))
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(file), str(source.path))) from error
    _card(model).pop("file", None)
    return model.eval()


def _card(model: Any) -> dict[str, Any]:
    """What timm keeps of a model's weights, beside them."""
    return model.pretrained_cfg


def write(source: Source, model: nn.Module, folder: Path) -> float:
    """Write the folder whole or not at all, after timm has loaded it and come to the same logits.

    Returns: the largest difference of a logit, over the largest logit.
    Raises: CheckpointError if it cannot be written or does not do the same, or would replace what is no such folder.
    """
    strange = sorted({entry.name for entry in folder.iterdir()} - _FILES) if folder.is_dir() else []
    if strange:
        raise CheckpointError(
            f"{folder} is not replaced: it holds {shortened(strange)}, which no model's folder does; name another."
        )
    arguments = {key: value for key, value in source.arguments.items() if key != "num_classes"}
    if source.classes:
        _card(model)["label_names"] = source.classes
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save_for_hf(
            model, str(temporary), model_args=arguments or None, safe_serialization=True, data_config=source.data_config
        )
        again = timm.create_model(f"local-dir:{temporary}", pretrained=True).eval()
        difference = parity(model, again)
        if difference > 1e-5:
            raise CheckpointError(f"{folder}: read back, the model differs by {difference:.2g}; nothing was written.")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return difference


def parity(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two models' outputs on random images, over the largest output."""
    generator = torch.Generator().manual_seed(0)
    size = models.data_config(one, {})["input_size"]
    images = torch.randn(2, *size, generator=generator)
    with torch.inference_mode():
        first, second = one(images), other(images)
    return float((first - second).abs().max() / first.abs().max().clamp(min=1e-12))
