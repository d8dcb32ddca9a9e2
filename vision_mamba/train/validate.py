"""How right a model is on held-out images, and how fast: alone, and together with what loads them."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.task import ClassificationEvaluator
from torch import Tensor

from vision_mamba.text import shortened
from vision_mamba.train.errors import ConfigError, DataError
from vision_mamba.train.images import ImageSet
from vision_mamba.train.loader import Feed
from vision_mamba.train.predict import Classifier

Labels = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Measured:
    """What came out of a validation; accuracies in percent."""

    name: str
    images: int
    top1: float
    top5: float
    loss: float
    images_per_s: float
    real1: float | None = None
    real5: float | None = None


def read_labels(path: str | Path) -> Labels:
    """Labels of ReaL's kind (arXiv:2006.07159): several or none an image, as file name -> indices.

    The file is JSON, a mapping, or a list in the order of ImageNet's validation images as the authors' is.

    Raises: DataError if it is neither.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"--real-labels {path} cannot be read: {error}.") from error
    if isinstance(content, list):
        content = {f"ILSVRC2012_val_{number:08d}.JPEG": labels for number, labels in enumerate(content, 1)}
    if not isinstance(content, dict) or not all(isinstance(labels, list) for labels in content.values()):
        raise DataError(f"--real-labels {path} must be a list of lists of class indices, or file name -> such a list.")
    return content


class RealLabels:
    """Accuracy where any of several labels is right, over the images that have one.

    Args:
        labels: file name -> indices. names: of the images, in the order in which predictions come.

    Raises: DataError if an image is not among the labels.
    """

    def __init__(self, labels: Labels, names: Iterable[str]) -> None:
        self._labels: list[Sequence[int]] = []
        for name in (Path(name).name for name in names):
            if name not in labels:
                raise DataError(f"--real-labels has no entry for {name}; {len(labels):,} other images are there.")
            self._labels.append(labels[name])
        self._seen = self._known = self._first = self._five = 0

    def update(self, output: Tensor) -> None:
        """Count the predictions for the next images."""
        best = output.topk(min(5, output.shape[-1])).indices.tolist()
        for chosen, labels in zip(best, self._labels[self._seen : self._seen + len(best)], strict=True):
            self._known += bool(labels)
            self._first += chosen[0] in labels
            self._five += any(one in labels for one in chosen)
        self._seen += len(best)

    def percent(self) -> tuple[float, float]:
        """Accuracy of the first guess and of the first five."""
        known = max(self._known, 1)
        return 100 * self._first / known, 100 * self._five / known


def check_classes(images: ImageSet, classifier: Classifier) -> None:
    """Raises: ConfigError if the model has no output for a class of the images."""
    outputs, highest = len(classifier.classes), max(images.targets)
    if highest >= outputs:
        raise ConfigError(
            f"the images are of {highest + 1:,} classes ({shortened(list(images.classes))}), and {classifier.name} has "
            f"{outputs:,} outputs; take the images that it was trained for."
        )


def measure(
    classifier: Classifier,
    feed: Feed,
    half: torch.dtype | None = None,
    real: RealLabels | None = None,
    seen: Callable[[int], object] = lambda count: None,
) -> Measured:
    """Validate a model.

    Args:
        half: type of mixed precision. seen: called with the size of each batch that is done.
    """
    evaluator = ClassificationEvaluator(classifier.device)
    began, images = time.perf_counter(), 0
    for batch, targets in feed:
        with torch.inference_mode(), torch.autocast(classifier.device.type, half, enabled=half is not None):
            output = classifier.model(batch)
        evaluator.update(output, targets)
        if real is not None:
            real.update(output)
        images += len(batch)
        seen(len(batch))
    figures: dict[str, Any] = dict(evaluator.compute())
    elapsed = max(time.perf_counter() - began, 1e-9)
    real1, real5 = (None, None) if real is None else real.percent()
    top = {name: figures[name] for name in ("top1", "top5", "loss")}
    return Measured(classifier.name, images, **top, images_per_s=images / elapsed, real1=real1, real5=real5)


def loading_rate(feed: Feed, batches: int) -> float:
    """Images a second that a loader gives for long, pass after pass: when all that was ready before is used up."""
    ready = 1 + feed.loader.num_workers * (feed.loader.prefetch_factor or 0)
    images, began = 0, 0.0
    passes = itertools.chain.from_iterable(itertools.repeat(feed))
    for number, (batch, _) in enumerate(itertools.islice(passes, ready + batches)):
        if number >= ready:
            images += len(batch)
        elif number == ready - 1:
            began = time.perf_counter()
    _wait(feed.device)
    return images / max(time.perf_counter() - began, 1e-9)


def model_rate(step: Callable[[], object], images: int, device: torch.device, batches: int) -> float:
    """Images a second that a step takes on so many images each time, after a few to warm up."""
    for _ in range(3):
        step()
    _wait(device)
    began = time.perf_counter()
    for _ in range(batches):
        step()
    _wait(device)
    return images * batches / max(time.perf_counter() - began, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
