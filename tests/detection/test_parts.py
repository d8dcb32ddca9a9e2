"""Transforms, batches, figures, pictures and options of detection, each by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torchvision import tv_tensors

from tests.detection import drawn
from vision_mamba.detection import pictures
from vision_mamba.detection.coco import CocoSet, open_split
from vision_mamba.detection.engine import schedule
from vision_mamba.detection.loader import GroupedBatches
from vision_mamba.detection.metrics import measure, results
from vision_mamba.detection.options import READER, Config
from vision_mamba.detection.transforms import RandomSizeCrop, augmentation
from vision_mamba.train.errors import ConfigError

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*/*rcnn*.yaml"))


@pytest.fixture
def held_out(tmp_path: Path) -> CocoSet:
    return open_split(drawn.draw(tmp_path, train=1, val=4), "val", masks=True)


def tight(mask: Tensor) -> list[int]:
    rows, columns = mask.nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("crop", [None, (24, 40)])
def test_boxes_follow_their_masks_through_the_augmentation(held_out: CocoSet, crop: tuple[int, int] | None) -> None:
    config = Config(min_size=(40, 56), max_size=80, hflip=0.5, crop_size=crop, crop_min_size=(48,))
    held_out.transform = augmentation(config)
    kept, sizes = 0, set()
    for turn in range(40):
        torch.manual_seed(turn)
        image, target = held_out[turn % len(held_out)]
        sizes.add(min(image.shape[1:]))
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        assert min(image.shape[1:]) in (40, 56) or max(image.shape[1:]) == 80
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            kept += 1
            assert np.abs(np.subtract(tight(mask), box.tolist())).max() <= 1.5  # rounding of the resizing
    assert kept > 40 and {40, 56} <= sizes


def test_colours_change_and_boxes_do_not(held_out: CocoSet) -> None:
    seen = {}
    for photometric in (False, True):
        torch.manual_seed(1)
        held_out.transform = augmentation(Config(min_size=(64,), max_size=96, hflip=0.0, photometric=photometric))
        seen[photometric] = held_out[0]
    (before, there), (after, here) = seen.values()
    assert before.shape == after.shape and not torch.equal(before, after)
    assert torch.equal(there["boxes"], here["boxes"]) and torch.equal(there["masks"], here["masks"])


def test_a_crop_is_of_the_sizes_asked_for() -> None:
    crop, sides = RandomSizeCrop(20, 30), set()
    for _ in range(60):
        part = crop(tv_tensors.Image(torch.zeros(3, 25, 100)))
        sides.add(tuple(part.shape[1:]))
    heights, widths = zip(*sides, strict=True)
    assert (min(heights), max(heights)) == (20, 25) and (min(widths), max(widths)) == (20, 30)


def test_batches_are_of_one_shape_and_no_image_comes_twice() -> None:
    wide = [bool(i % 3) for i in range(50)]
    shares = [GroupedBatches(wide, 4, seed=1, rank=rank, processes=2) for rank in range(2)]
    for share in shares:
        share.at(epoch=3, batch=0)
    keys = [[key for batch in share for key in batch] for share in shares]
    numbers = [number for share in keys for _, _, number in share]
    assert len(numbers) == len(set(numbers)) == 48 == 4 * 2 * len(shares[0])
    assert not {place for _, place, _ in keys[0]} & {place for _, place, _ in keys[1]}
    mixed = [batch for batch in shares[0].of_epoch(3) if len({wide[number] for number in batch}) > 1]
    assert len(mixed) <= 1
    assert shares[0].of_epoch(3) != shares[0].of_epoch(4)


def test_a_pass_can_begin_at_any_batch() -> None:
    batches = GroupedBatches([True] * 12, 3, seed=0)
    batches.at(5, 0)
    whole = list(batches)
    batches.at(5, 2)
    assert list(batches) == whole[2:] and len(whole) == 4


def perfect(held_out: CocoSet, shift: float = 0.0, **changes: Any) -> list[dict[str, Any]]:
    detections = []
    for _, target in (held_out[i] for i in range(len(held_out))):
        one = {
            "boxes": target["boxes"] + shift,
            "labels": target["labels"],
            "scores": torch.rand(len(target["labels"])),
        }
        detections.append(one | {"masks": target["masks"][:, None].float()} | changes)
    return results(detections, held_out.images, held_out.categories)


def test_figures_of_what_is_known(held_out: CocoSet) -> None:
    measured = measure(held_out, perfect(held_out), masks=True)
    assert measured["AP"] == measured["AP50"] == measured["mask_AP"] == measured["AR"] == 1.0
    assert measured["AP_small"] == 1.0 and measured["AP_large"] is None  # there are small objects alone
    shifted = measure(held_out, perfect(held_out, shift=2.0), masks=True)
    assert shifted["AP50"] == 1.0 and 0.1 < shifted["AP"] < 0.9 and shifted["mask_AP"] == 1.0
    assert measure(held_out, [], masks=True) == {key: None if v is None else 0.0 for key, v in measured.items()}


def test_a_wrong_label_counts_as_not_found(held_out: CocoSet) -> None:
    found = [entry | {"category_id": 10 - entry["category_id"]} for entry in perfect(held_out)]
    assert measure(held_out, found, masks=False)["AP50"] < 0.5


def test_a_sheet_shows_truth_and_what_is_sure(held_out: CocoSet) -> None:
    image, target = held_out[0]
    found = {"boxes": target["boxes"], "labels": target["labels"], "scores": torch.full((len(target["labels"]),), 0.4)}
    scene = pictures.Scene(image / 255, target, found)
    above, below = (np.asarray(pictures.sheet([scene], held_out.names, threshold)) for threshold in (0.3, 0.5))
    half = above.shape[0] // 2
    assert (above[:half] == below[:half]).all() and (above[half + 18 :] != below[half + 18 :]).any()
    plain = np.asarray(pictures.drawn(image / 255, {name: value[:0] for name, value in found.items()}, held_out.names))
    assert (below[half + 18 : half + 18 + plain.shape[0], : plain.shape[1]] == plain).all()


def test_the_learning_rate_rises_and_falls() -> None:
    config = Config(sched="cosine", warmup_steps=0, epochs=2)
    rates = [schedule(config, 10)(step) for step in (0, 10, 20)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])
    rate = schedule(Config(warmup_steps=1000, warmup_factor=1e-3, decay_milestones=(8, 11)), 500)
    steps = (0, 500, 1000, 3999, 4000, 5500)
    assert [rate(step) for step in steps] == pytest.approx([1e-3, 0.5005, 1, 1, 0.1, 0.01])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_one(path: Path) -> None:
    config = Config(**READER.read_yaml(path))
    assert timm.is_model(config.model) and config.run_dir.parts[0] == "output"
    assert f"--config {path.relative_to(path.parents[2])}" in path.read_text()


def options(tmp_path: Path, text: str, *flags: str) -> Config:
    (tmp_path / "c.yaml").write_text(text)
    return READER.parse(["--config", str(tmp_path / "c.yaml"), *flags], lambda path: {})


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    text = "epochs: 3\nmin_size: [480, 512]\namp: true\ndetector_kwargs: {box_detections_per_img: 5}\nclip_grad: none\n"
    config = options(tmp_path, text, "--epochs", "4", "--no-amp", "--crop-size", "20", "30")
    assert (config.epochs, config.min_size, config.amp, config.crop_size) == (4, (480, 512), False, (20, 30))
    assert config.detector_kwargs == {"box_detections_per_img": 5} and config.clip_grad is None


@pytest.mark.parametrize(
    "text, flags, complaint",
    [
        ("epchs: 3", (), "c.yaml:1: unknown key 'epchs'; did you mean 'epochs'?"),
        ("epochs: many", (), "c.yaml:1: epochs must be a whole number, got 'many'"),
        ("epochs: 0", (), "epochs must be at least 1, got 0"),
        ("workers: -1", (), "workers must be at least 0, got -1"),
        ("min_size: [320, 0]", (), "min_size must be at least 1, got [320, 0]"),
        ("lr: .nan", (), "lr must be a number, got nan"),
        ("amp: 1", (), "amp must be true or false, got 1"),
        ("detector: yolo", (), "detector is 'yolo', which is unknown; did you mean"),
        ("detector: yolo", (), "Known: faster_rcnn, mask_rcnn, "),
        ("opt: adamv", (), "opt is 'adamv', which is unknown; did you mean 'adam"),
        ("- 1", (), "must be lines of 'key: value', got a seq"),
        ("model_kwargs: !made {}", (), "c.yaml cannot be read: could not determine a constructor for the tag '!made'"),
        ("epochs: 3", ("--epchs", "3"), "unknown flag --epchs; did you mean --epochs?"),
        ("epochs: 3", ("--lr", "fast"), "--lr must be a number, got 'fast'"),
        ("epochs: 3", ("--detector-kwargs", "a=["), "--detector-kwargs must be words like img_size=32, got 'a=['"),
        ("epochs: 3", ("--lr",), "--lr: expected one argument."),
        ("crop_size: [384]", (), "crop_size must be 2 numbers, got [384]"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, text: str, flags: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        options(tmp_path, text, *flags)
    assert complaint in str(refused.value)
