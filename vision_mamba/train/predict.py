"""Predictions of trained checkpoints: the model and its preprocessing are rebuilt from what the checkpoint says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import nn

from vision_mamba.train import checkpoint
from vision_mamba.train import model as models
from vision_mamba.train.errors import CheckpointError
from vision_mamba.train.images import ImageSet
from vision_mamba.train.loader import evaluation_feed
from vision_mamba.train.parallel import World


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image: its most likely classes, each with its probability, the likeliest first."""

    index: int
    name: str
    target: str | None
    top: tuple[tuple[str, float], ...]

    @property
    def right(self) -> bool | None:
        """None where the true class is unknown."""
        return None if self.target is None else self.target == self.top[0][0]


@dataclass(frozen=True)
class Classifier:
    """A trained model with the names of its classes and the preprocessing that it was trained with."""

    name: str
    model: nn.Module
    classes: list[str]
    data_config: dict[str, Any]
    device: torch.device
    named_classes: bool = True  # else the names are not those of the folders trained on

    @property
    def mode(self) -> str:
        """PIL mode of the images it takes."""
        return "L" if self.data_config["input_size"][0] == 1 else "RGB"

    def predict(
        self, images: ImageSet, batch_size: int = 64, top: int = 3, seen: Callable[[int], object] = lambda count: None
    ) -> list[Prediction]:
        """Classify images, in their order.

        Args:
            top: how many classes to report of each image.
            seen: called with the size of each batch that is done.

        Raises: DataError naming an image that cannot be read.
        """
        loader = evaluation_feed(images, self.data_config, batch_size, 0, World(self.device))
        predictions: list[Prediction] = []
        for batch, _ in loader:
            with torch.inference_mode():
                probabilities = self.model(batch).float().softmax(-1).cpu()
            values, indices = probabilities.topk(min(top, probabilities.shape[-1]))
            for value, chosen in zip(values.tolist(), indices.tolist(), strict=True):
                index = len(predictions)
                target = images.targets[index]
                predictions.append(
                    Prediction(
                        index,
                        images.names[index],
                        images.classes[target] if target >= 0 else None,
                        tuple((self.classes[i], p) for i, p in zip(chosen, value, strict=True)),
                    )
                )
            seen(len(batch))
        return predictions


def accuracy(predictions: list[Prediction]) -> float | None:
    """Percentage of right predictions among those whose true class is known, or None if there is none."""
    known = [prediction.right for prediction in predictions if prediction.right is not None]
    return 100 * sum(known) / len(known) if known else None


def load(path: str, device: torch.device, name: str | None = None) -> Classifier:
    """Rebuild a trained model.

    Args:
        path: a checkpoint of tools/train.py; or a bare state_dict with `name`.
        name: the registered model; the checkpoint says it, if it is one of ours.

    Raises: CheckpointError if the file is damaged or not of this model; ConfigError if the model is unknown.
    """
    content = checkpoint.read(path)
    state_dict = checkpoint.weights(content, path)
    options = content.get("args") or {}
    name = name or content.get("arch")
    if not isinstance(options, dict) or name is None:
        raise CheckpointError(f"checkpoint {path} does not say which model it is of; pass --model NAME.")
    models.check_name(name, "--model" if not options else f"{path}: model")
    classes = content.get("classes")
    arguments = {
        "num_classes": options.get("num_classes") or (len(classes) if classes else None),
        **(options.get("model_kwargs") or {}),
    }
    model = models.build(name, options, arguments)
    checkpoint.load(model, state_dict, path, name, content.get("arch"))
    return Classifier(
        name=name,
        model=model.to(device).eval(),
        classes=_numbered(classes or [], model.num_classes),  # type: ignore[arg-type]
        data_config=content.get("data_config") or models.data_config(model, options),
        device=device,
        named_classes=bool(classes),
    )


def named(
    name: str,
    device: torch.device,
    weights: str | None = None,
    options: dict[str, Any] | None = None,
    pretrained: bool = True,
) -> Classifier:
    """A model by name, with its published weights, those of a file, such as an official checkpoint, or random ones.

    Args:
        options: img_size, in_chans and what else of a run's options concerns the model.

    Raises: ConfigError if the model is unknown; CheckpointError if the weights do not fit.
    """
    models.check_name(name)
    options = options or {}
    arguments: dict[str, Any] = {"pretrained": pretrained or weights is not None}
    if weights is not None:
        source = models.source(name, weights)
        arguments |= {"pretrained_cfg_overlay": source, "num_classes": source.get("num_classes")}
    model = models.build(name, options, arguments, weights)
    told = model.pretrained_cfg.get("label_names")  # type: ignore[operator,union-attr]
    classes = list(told.values()) if isinstance(told, dict) else list(told or [])
    if not classes and model.num_classes == 1000:
        classes = ImageNetInfo().label_descriptions()  # type: ignore[assignment]
    return Classifier(
        name=name,
        model=model.to(device).eval(),
        classes=_numbered(classes, model.num_classes),  # type: ignore[arg-type]
        data_config=models.data_config(model, options),
        device=device,
        named_classes=bool(told),
    )


def _numbered(classes: list[str], outputs: int) -> list[str]:
    """As many names as there are outputs: the numbers of those that have none."""
    return [*classes, *map(str, range(len(classes), outputs))]
