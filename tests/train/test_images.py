"""Images: data directories that are not as they should be, unreadable files, and the order of batches."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp

from tests.train import runs
from vision_mamba.train.bad_images import unreadable, without_unreadable
from vision_mamba.train.errors import ConfigError, DataError
from vision_mamba.train.images import class_folders, digits, files, split_folder
from vision_mamba.train.loader import training_feed
from vision_mamba.train.options import Config
from vision_mamba.train.parallel import World
from vision_mamba.train.sampler import epoch_batches
from vision_mamba.train.seeds import seeded

DATA_CONFIG = {
    "input_size": [3, 16, 16],
    "mean": [0.5] * 3,
    "std": [0.5] * 3,
    "interpolation": "bilinear",
    "crop_pct": 1.0,
    "crop_mode": "center",
}
CPU = torch.device("cpu")


def damage(images: Path) -> list[Path]:
    """Files that end too early, hold something else, or nothing."""
    left = images / "train" / "left"
    (left / "0.png").write_bytes((left / "0.png").read_bytes()[:300])
    (left / "1.png").write_text("not a picture")
    (left / "2.png").write_bytes(b"")
    return [left / name for name in ("0.png", "1.png", "2.png")]


def test_digits_are_split_by_a_stratified_fifth() -> None:
    train, held_out = digits(False), digits(True)
    assert (len(train), len(held_out)) == (1437, 360)
    assert not set(train.names) & set(held_out.names)
    counts = np.bincount(held_out.targets)
    assert counts.min() >= 34 and counts.max() <= 37
    assert np.asarray(train.image(0)).shape == (8, 8) and np.asarray(train.image(0)).max() > 200


@pytest.mark.parametrize("name", ["val", "valid", "validation", "eval"])
def test_the_held_out_folder_goes_by_its_usual_names(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    assert split_folder(tmp_path, "validation") == tmp_path / name


def test_a_data_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data-dir .*nowhere does not exist; the layout is DIR/train"):
        split_folder(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match=r"--data-dir is not given; .* or choose --dataset digits"):
        split_folder(None, "train")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"is not a directory"):
        split_folder(tmp_path / "file", "train")


def test_a_data_directory_without_its_splits(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must hold a folder train, found nothing, it is empty"):
        split_folder(tmp_path, "train")
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match=r"must hold a folder val or validation or valid or eval, found cats;"):
        split_folder(tmp_path, "val")


def test_a_folder_without_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is empty; known are files ending in .*png"):
        class_folders(tmp_path, "RGB")
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "readme.txt").touch()
    with pytest.raises(DataError, match=r"has no image in it"):
        class_folders(tmp_path, "RGB")


def test_images_outside_of_class_folders(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path) / "train"
    shutil.copy(folder / "left" / "0.png", folder / "loose.png")
    with pytest.raises(DataError, match=r"must hold one folder a class, found 1 images in none \(loose.png\); move"):
        class_folders(folder, "RGB")


def test_a_held_out_class_that_is_not_trained_on(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path)
    (folder / "val" / "upper").rename(folder / "val" / "lower")
    with pytest.raises(DataError, match=r"has classes that are not trained on: lower; known: left, upper"):
        class_folders(folder / "val", "RGB", class_folders(folder / "train", "RGB").classes)


def test_a_class_missing_among_the_held_out_keeps_the_numbers_of_the_others(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path)
    shutil.rmtree(folder / "val" / "left")
    held_out = class_folders(folder / "val", "RGB", class_folders(folder / "train", "RGB").classes)
    assert set(held_out.targets) == {1} and list(held_out.classes) == ["left", "upper"]


def test_unreadable_images_are_named_and_counted(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path)
    bad = damage(folder)
    images = class_folders(folder / "train", "RGB")
    reasons = unreadable(images, threads=2)
    assert [images.names[index] for index in reasons] == [str(path) for path in bad]
    with pytest.raises(DataError, match=r"3 of 12 images cannot be read:\n  image .*0.png cannot be read") as caught:
        without_unreadable(images, reasons, limit=2, warn=print)
    assert all(str(path) in str(caught.value) for path in bad)
    assert "--skip-bad-images 3" in str(caught.value)


def test_pixels_of_more_than_8_bits_are_not_cut_off_in_silence(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path)
    wide = sorted((folder / "train").rglob("*.png"))[0]
    Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16)).save(wide)
    images = class_folders(folder / "train", "RGB")
    (reason,) = unreadable(images, threads=1).values()
    assert re.search(r"its pixels are wider than 8 bits \(mode I;?1?6?\), .* scale them to 8 bits", str(reason))


def test_unreadable_images_are_left_out_on_request_and_listed(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path)
    bad = damage(folder)
    images = class_folders(folder / "train", "RGB")
    told: list[str] = []
    rest = without_unreadable(images, unreadable(images, 1), limit=3, warn=told.append)
    assert len(rest) == 9 and not {str(path) for path in bad} & set(rest.names)
    assert len(told) == 3 and "1.png cannot be read: not an image in a known format" in told[1]
    assert [rest.image(i).tobytes() for i in range(9)] == [images.image(i).tobytes() for i in range(3, 12)]


def test_nothing_is_left_when_all_are_unreadable(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path, train=1)
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    images = class_folders(folder / "train", "RGB")
    with pytest.raises(DataError, match=r"none of the 2 images can be read"):
        without_unreadable(images, unreadable(images, 1), limit=2, warn=lambda message: None)


def test_a_run_stops_before_its_first_step_unless_told_to_leave_them_out(
    drawn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(drawn / "images")
    with pytest.raises(DataError, match=r"3 of 12 images cannot be read"):
        runs.fit(runs.config(drawn))
    assert not (drawn / "output" / "run" / "last.pth").exists()
    with caplog.at_level("WARNING", "vision_mamba.train"):
        runs.fit(runs.config(drawn, skip_bad_images=3, epochs=1))
    assert [record for record in caplog.messages if record.startswith("left out: image")] == caplog.messages[:3]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_later_stops_the_run_without_losing_it(drawn: Path, workers: int) -> None:
    damage(drawn / "images")
    with pytest.raises(
        DataError, match=r"images cannot be read, more than --skip-bad-images 0:\n  image .*png"
    ) as caught:
        runs.fit(runs.config(drawn, check_images=False, batch_size=2, mixup=0.0, workers=workers))
    assert "Traceback" not in str(caught.value)
    saved = torch.load(drawn / "output" / "run" / "last.pth", weights_only=True)
    assert saved["epoch"] == 0


def test_files_and_folders_to_predict(tmp_path: Path) -> None:
    folder = runs.draw(tmp_path)
    (folder / "val" / "folder.png").mkdir()
    images = files([folder / "val", folder / "train" / "left" / "0.png"], "RGB", ["upper", "left"])
    assert len(images) == 7 and images.targets == [1, 1, 1, 0, 0, 0, 1]
    with pytest.raises(DataError, match=r"nowhere.png does not exist"):
        files([folder / "nowhere.png"], "RGB", [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty has no image in it"):
        files([tmp_path / "empty"], "RGB", [])


def test_grey_images_become_three_channels_and_back(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    assert files([tmp_path], "RGB", []).image(0).mode == "RGB"
    assert files([tmp_path], "L", []).image(0).getpixel((0, 0)) == 7


def test_an_epoch_has_every_image_once_in_an_order_of_its_own() -> None:
    config = Config(batch_size=5, seed=1)
    batches = epoch_batches(config, 10)
    orders = []
    for epoch in range(2):
        batches.at(epoch, 0)
        orders.append([key.image for batch in batches for key in batch])
        assert sorted(orders[-1]) == list(range(10))
    assert orders[0] != orders[1]
    assert len(epoch_batches(config, 11)) == 2


def test_batches_are_the_same_from_the_middle_of_an_epoch_and_with_any_number_of_processes(tmp_path: Path) -> None:
    images = class_folders(runs.draw(tmp_path) / "train", "RGB")

    def load(start: int, workers: int) -> list[torch.Tensor]:
        config = Config(scale=(0.2, 1.0), batch_size=4, workers=workers, seed=5)
        loader = training_feed(images, DATA_CONFIG, config, World(CPU))
        loader.at(2, start)
        state = torch.get_rng_state()
        batches = [batch for batch, _ in loader]
        assert torch.equal(state, torch.get_rng_state()), "loading draws nothing from the run's own generator"
        return batches

    whole = load(0, 0)
    assert len(whole) == 3
    for start, workers in ((1, 0), (0, 2), (2, 1)):
        rest = load(start, workers)
        assert len(rest) == 3 - start
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.parametrize("name", ["Posterize", "PosterizeIncreasing", "PosterizeOriginal"])
@pytest.mark.parametrize("level", [0, 10])
def test_augmentations_take_every_level(name: str, level: int) -> None:
    image = Image.fromarray(np.full((4, 4, 3), 200, np.uint8))
    left = AugmentOp(name, 1.0, level, {})(image).getpixel((0, 0))
    assert left in ((0, 0, 0), (192, 192, 192), (200, 200, 200)), "no bits, four at least, all"


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    images = class_folders(runs.draw(tmp_path) / "train", "RGB")
    with pytest.raises(DataError, match=r"12 images make no batch of 13; lower --batch-size"):
        training_feed(images, DATA_CONFIG, Config(batch_size=13, workers=0), World(CPU))


def test_mixing_wants_pairs(drawn: Path) -> None:
    with pytest.raises(ConfigError, match=r"--batch-size must be even for --mixup and --cutmix, got 3"):
        runs.fit(runs.config(drawn, batch_size=3))


def test_seeding_draws_by_the_key_and_leaves_every_generator_where_it_was() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    runs_on = []
    for inside in (False, True):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        if inside:
            with seeded(1, 2):
                first = draw()
            with seeded(1, 2):
                assert draw() == first
            with seeded(1, 3):
                assert not set(draw()) & set(first)
        runs_on.append(draw())
    assert runs_on[0] == runs_on[1]
