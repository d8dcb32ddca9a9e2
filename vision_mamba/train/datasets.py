"""The images that the options name: class folders, the digits, and whatever timm.data reads."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import create_dataset
from timm.data.dataset import IterableImageDataset

from vision_mamba.train.errors import ConfigError, DataError
from vision_mamba.train.images import ImageSet, class_folders, digits, split_folder
from vision_mamba.train.options import Config

STREAMS = ("hfids/", "tfds/", "wds/")
Images = ImageSet | IterableImageDataset


@dataclass(frozen=True)
class _FromTimm:
    """index -> image of a data set that timm built."""

    dataset: Any

    def __call__(self, index: int) -> Image.Image:
        if hasattr(self.dataset, "reader"):
            return Image.open(self.dataset.reader[index][0])
        return self.dataset[index][0]  # torchvision's decode by themselves


def image_sets(config: Config, mode: str) -> tuple[Images, Images, list[str]]:
    """The images to train on, those held out, and the names of the classes.

    Args:
        mode: PIL mode, "RGB" or "L".

    Raises: DataError if they cannot be had; ConfigError if the options do not say enough.
    """
    if config.dataset == "digits":
        train_set: Any = digits(False, mode)
    elif config.dataset in ("folder", ""):
        train_set = _folder(config, config.train_split, mode, _lines(config.class_map))
    else:
        train_set = _named(config, True, mode)
    held_out = held_out_images(config, mode, getattr(train_set, "classes", None))
    if not isinstance(train_set, ImageSet):
        if config.num_classes is None:
            raise ConfigError(f"--dataset {config.dataset} is a stream, which needs --num-classes N.")
        if config.workers == 0:
            raise ConfigError(f"--dataset {config.dataset} is a stream, which needs --workers 1 or more.")
        if config.train_img_sizes is not None or config.aug_repeats:
            raise ConfigError(
                f"--dataset {config.dataset} is a stream, which knows neither --train-img-sizes nor --aug-repeats."
            )
        return train_set, held_out, [str(number) for number in range(config.num_classes)]
    return train_set, held_out, list(train_set.classes)


def held_out_images(config: Config, mode: str, classes: Sequence[str] | None = None) -> Images:
    """The held-out images alone.

    Args:
        classes: names in the order of the model's outputs; those of the folder if not given.
    """
    if config.dataset == "digits":
        return digits(True, mode)
    if config.dataset in ("folder", ""):
        return _folder(config, config.val_split, mode, classes or _lines(config.class_map))
    return _named(config, False, mode)


def _folder(config: Config, split: str, mode: str, classes: Sequence[str] | None) -> ImageSet:
    place = split_folder(config.data_dir, split)
    if place.is_dir():
        return class_folders(place, mode, classes)
    try:
        found = _images(create_dataset("", root=str(place), search_split=False), str(place), mode)
    except (AssertionError, OSError, RuntimeError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{place} cannot be read: {error or 'it holds no class folders with images'}.") from error
    if classes is None or list(classes) == list(found.classes):
        return found
    if strange := [name for name in found.classes if name not in classes]:
        raise DataError(f"{place} has classes that are not trained on: {', '.join(strange[:5])}.")
    found.targets = [list(classes).index(found.classes[target]) for target in found.targets]
    found.classes = classes
    return found


def _lines(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--class-map {path} cannot be read: {error.strerror}.") from error


def _named(config: Config, training: bool, mode: str) -> Images:
    """A data set by its name in timm.data."""
    split = config.train_split if training else config.val_split
    reader: dict[str, Any] = {"input_key": config.input_key, "target_key": config.target_key}
    if not config.dataset.startswith("torch/"):
        reader |= {"class_map": config.class_map, "input_img_mode": mode}
    if config.dataset.startswith(STREAMS):
        reader |= {"num_samples": config.train_num_samples if training else config.val_num_samples}
    try:
        dataset = create_dataset(
            config.dataset,
            root=config.data_dir,
            split=split,
            is_training=training,
            download=config.dataset_download,
            batch_size=config.batch_size,
            seed=config.seed,
            **{key: value for key, value in reader.items() if value is not None},
        )
    except ImportError as error:
        raise DataError(f"--dataset {config.dataset}: {error}; pip install {error.name or 'it'}") from error
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"--dataset {config.dataset}, split {split}, in {config.data_dir}: {error}") from error
    if isinstance(dataset, IterableImageDataset):
        return dataset
    return _images(dataset, f"{config.dataset} {split}", mode)


def _images(dataset: Any, name: str, mode: str) -> ImageSet:
    """A data set of timm's, or of torchvision's, with random access."""
    reader = getattr(dataset, "reader", dataset)
    if hasattr(reader, "iter_targets"):
        targets = list(reader.iter_targets())
    else:
        targets = [int(target) for target in reader.targets]
    found = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
    classes = sorted(found, key=found.get) or [str(number) for number in range(max(targets) + 1)]  # type: ignore[arg-type]
    names = [f"{name} {index}" for index in range(len(targets))]
    if hasattr(reader, "tar_state"):
        names = [f"{name}:{inside}" for inside in dataset.filenames()]
        reader.cache_tarfiles = False  # threads and forked processes would share the position in an open file
    return ImageSet(names, targets, classes, _FromTimm(dataset), mode)
