"""What recipes ask for beyond a plain run: each option does what it says, in a run of a second."""

from __future__ import annotations

import dataclasses
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from tests.train import runs
from tests.train.runs import STEPS
from tests.train.test_resume import interrupted
from vision_mamba.train.checkpoint import DAMAGED, LAST, PREVIOUS
from vision_mamba.train.errors import CheckpointError, ConfigError, DataError
from vision_mamba.train.learner import learning_rate
from vision_mamba.train.options import Config
from vision_mamba.train.sampler import batch_after, epoch_batches, images_before

PLAIN: dict[str, Any] = {"drop_path": 0.0, "mixup": 0.0, "no_aug": True, "epochs": 1}


def trained(folder: Path, name: str, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a run."""
    config = runs.config(folder, experiment=name, **options)
    runs.fit(config)
    return runs.weights(config.run_dir)


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(one[key], other[key], rtol=1e-3, atol=1e-5) for key in one)


def test_the_same_gradients_in_other_ways(drawn: Path) -> None:
    plain = trained(drawn, "plain", **PLAIN)
    for name, options in {
        "accumulated": {"batch_size": 2, "grad_accum_steps": 2},
        "recomputed": {"grad_checkpointing": True},
    }.items():
        assert close(trained(drawn, name, **PLAIN, **options), plain), name
    assert not close(trained(drawn, "otherwise", **PLAIN, lr_base=1e-2, lr=None), plain)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(drawn: Path) -> None:
    assert close(trained(drawn, "compiled", **PLAIN, torchcompile="aot_eager"), trained(drawn, "plain", **PLAIN))


@pytest.mark.parametrize(
    "options",
    [
        {"train_img_sizes": (32, 64), "train_batch_sizes": (4, 2), "train_size_schedule": "progressive"},
        {"aug_repeats": 2, "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.5, "cutmix": 1.0, "mixup_mode": "elem"},
        {"grad_accum_steps": 2, "batch_size": 2, "bce_loss": True, "layer_decay": 0.8, "opt": "lamb"},
    ],
    ids=["sizes", "augmentation", "accumulation"],
)
def test_recipes_stop_and_go_on_as_if_nothing_had_been(drawn: Path, options: dict[str, Any]) -> None:
    whole = trained(drawn, "whole", **options)
    interrupted(runs.config(drawn, **options), STEPS - 1)
    runs.fit(runs.config(drawn, resume="auto", **options))
    assert runs.same(runs.weights(drawn / "output" / "run"), whole)


@pytest.mark.parametrize("kind", ["logit", "feature"])
def test_a_teacher_is_followed_and_does_not_change(drawn: Path, kind: str) -> None:
    path = drawn / "teacher.pth"
    teacher = timm.create_model("test_vit", num_classes=2, img_size=32)
    torch.save(teacher.state_dict(), path)
    options = {"kd_model_name": "test_vit", "kd_checkpoint": str(path), "kd_distill_type": kind}
    followed = trained(drawn, "followed", **PLAIN, **options)
    assert followed.keys() == trained(drawn, "alone", **PLAIN).keys()
    assert not runs.same(followed, runs.weights(drawn / "output" / "alone"))
    saved = torch.load(drawn / "output" / "followed" / LAST, weights_only=True)
    assert ("task_state" in saved) == (kind == "feature"), "the projection between their features is saved"
    runs.fit(runs.config(drawn, experiment="followed", resume="auto", **{**PLAIN, "epochs": 2}, **options))


def test_a_token_is_taught(drawn: Path) -> None:
    path = drawn / "teacher.pth"
    torch.save(timm.create_model("test_vit", num_classes=2, img_size=32).state_dict(), path)
    student = {"model": "deit_tiny_distilled_patch16_224", "model_kwargs": {"depth": 1, "embed_dim": 24}}
    options = {"kd_model_name": "test_vit", "kd_checkpoint": str(path), "kd_distill_type": "token", **student}
    first, _ = (
        trained(drawn, name, **PLAIN, **options, distill_loss_weight=w) for name, w in (("one", 1.0), ("no", 0.0))
    )
    untaught = runs.weights(drawn / "output" / "no")
    assert not torch.equal(first["head_dist.weight"], untaught["head_dist.weight"])
    with pytest.raises(ConfigError, match=r"--kd-model-name test_vit: .*TokenDistillationTask|distill"):
        runs.fit(
            runs.config(
                drawn, experiment="ours", **PLAIN, **{**options, **{"model": "test_vmamba", "model_kwargs": None}}
            )
        )


def test_tar_files_hold_the_same_images(drawn: Path) -> None:
    for split in ("train", "val"):
        with tarfile.open(drawn / "images" / f"{split}.tar", "w") as archive:
            for name in ("left", "upper"):
                archive.add(drawn / "images" / split / name, name)
    folder = trained(drawn, "folder", **PLAIN)
    for split in ("train", "val"):
        (drawn / "images" / split).rename(drawn / split)
    packed = trained(drawn, "tar", **PLAIN, workers=1)
    assert packed.keys() == folder.keys()
    saved = torch.load(drawn / "output" / "tar" / LAST, weights_only=True)
    assert (saved["classes"], saved["images"]) == (["left", "upper"], 12)
    archived = drawn / "images" / "train.tar"
    archived.write_bytes(archived.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"train.tar cannot be read: "):
        trained(drawn, "cut", **PLAIN)


def test_a_stream_stops_and_goes_on_as_if_nothing_had_been(drawn: Path) -> None:
    pytest.importorskip("webdataset")
    images = drawn / "images"
    for split in ("train", "val"):
        paths = sorted((images / split).rglob("*.png"))
        for shard in range(2):
            with tarfile.open(images / f"{split}-{shard}.tar", "w") as archive:
                for path in paths[shard::2]:
                    label = path.with_suffix(".cls")
                    label.write_text(str(("left", "upper").index(path.parent.name)))
                    for part in (path, label):
                        archive.add(part, f"{path.parent.name}{part.name}")
    shards = {"train_split": "train-{0..1}.tar", "train_num_samples": 12}
    shards |= {"val_split": "val-{0..1}.tar", "val_num_samples": 6}
    options: dict[str, Any] = {"dataset": "wds/drawn", "num_classes": 2, "workers": 1, **shards}
    whole = trained(drawn, "whole", **options)
    interrupted(runs.config(drawn, **options), STEPS - 1)
    runs.fit(runs.config(drawn, resume="auto", **options))
    assert runs.same(runs.weights(drawn / "output" / "run"), whole)
    for wrong, told in (
        ({"num_classes": None}, "which needs --num-classes N"),
        ({"train_img_sizes": (32, 64)}, "which knows neither --train-img-sizes nor --aug-repeats"),
    ):
        with pytest.raises(ConfigError, match=f"--dataset wds/drawn is a stream, {told}"):
            runs.fit(runs.config(drawn, experiment="other", **{**options, **wrong}))


@pytest.mark.parametrize("kind, options", [("hfds", {}), ("hfids", {"num_classes": 2, "dataset_download": True})])
def test_data_sets_of_hugging_face_stop_and_go_on(
    drawn: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    config = pytest.importorskip("datasets").config
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)  # the images lie in a folder
    options |= {"dataset": f"{kind}/{drawn / 'images'}", "data_dir": str(drawn / "cache"), "workers": 1}
    whole = trained(drawn, "whole", **options)
    interrupted(runs.config(drawn, **options), STEPS - 1)
    runs.fit(runs.config(drawn, resume="auto", **options))
    assert runs.same(runs.weights(drawn / "output" / "run"), whole)
    saved = torch.load(drawn / "output" / "run" / LAST, weights_only=True)
    assert (saved["classes"], saved["images"]) == (["left", "upper"] if kind == "hfds" else ["0", "1"], 12)


def test_figures_go_to_weights_and_biases(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(drawn))
    runs.fit(runs.config(drawn, log_wandb=True, wandb_project="drawn"))
    assert wandb.run.summary["eval_top1"] >= 0 and wandb.run.step >= 1
    wandb.finish()
    assert list(drawn.glob("wandb/offline-run-*/*.wandb"))


def test_repeated_augmentation_draws_fewer_images_more_often() -> None:
    config = Config(batch_size=4, aug_repeats=2, seed=1)
    shares = []
    for rank in range(2):
        batches = epoch_batches(config, 32, rank, 2)
        batches.at(3, 0)
        shares.append([key.image for batch in batches for key in batch])
    assert len(shares[0]) == len(shares[1]) == 16 and shares[0] == shares[1], "each process augments the image anew"
    assert set(Counter(shares[0] + shares[1]).values()) == {2}


def test_processes_share_the_images_out() -> None:
    config = Config(batch_size=2, seed=1)
    both = [epoch_batches(config, 9, rank, 2) for rank in range(2)]
    one = epoch_batches(Config(batch_size=4, seed=1), 9)
    for batches in zip(*both, one, strict=True):
        first, second, whole = ({key.image for key in batch} for batch in batches)
        assert first | second == whole and not first & second


def test_the_learning_rate_grows_with_the_images_of_a_step() -> None:
    assert learning_rate(Config(lr=0.3, batch_size=7), 4) == 0.3
    assert learning_rate(Config(lr_base=0.1, batch_size=128, grad_accum_steps=2), 4) == pytest.approx(0.2)
    assert learning_rate(Config(lr_base=0.1, batch_size=128, opt="sgd"), 8) == pytest.approx(0.4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_img_sizes": (32, 64), "train_batch_sizes": (4,)}, r"--train-batch-sizes must be as many as"),
        ({"train_img_sizes": (32,), "train_size_schedule": "progressive"}, r"requires at least two choices"),
        ({"device_modules": ("no_such_module",)}, r"--device-modules no_such_module cannot be imported"),
        ({"kd_model_name": "resnet5o"}, r"--kd-model-name 'resnet5o' is not a registered model; did you mean 'resnet5"),
        ({"dataset": "wds/cats"}, r"--dataset wds/cats"),
        ({"kd_checkpoint": "best.pth"}, r"--kd-checkpoint means nothing without --kd-model-name"),
        ({"aa": "random"}, r"--aa random is no policy that timm knows; examples: rand-m9"),
        ({"gp": "mean"}, r"model 'test_vmamba' cannot be built with .*'global_pool': 'mean'.*Invalid pool type"),
        ({"opt_betas": (2.0, 3.0)}, r"--opt adamw, --opt-betas, .*Invalid beta parameter"),
        ({"torchcompile": "inductr"}, r"--torchcompile inductr, .*Invalid backend"),
    ],
)
def test_options_that_cannot_be_had_are_refused(drawn: Path, options: dict[str, Any], message: str) -> None:
    from vision_mamba.train.errors import TrainError

    with pytest.raises(TrainError, match=message):
        runs.fit(runs.config(drawn, **options))


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it_aloud(
    drawn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trained(drawn, "whole")
    config = runs.config(drawn, recovery_interval=1)
    interrupted(config, STEPS + 1)
    last = config.run_dir / LAST
    last.write_bytes(last.read_bytes()[:1000])
    with caplog.at_level("INFO", "vision_mamba.train"):
        runs.fit(runs.config(drawn, recovery_interval=1, resume="auto"))
    assert "last.pth (1,000 bytes) is truncated" in caplog.text and "going on from the one before it" in caplog.text
    assert (config.run_dir / DAMAGED).stat().st_size == 1000
    assert runs.same(runs.weights(config.run_dir), whole)
    for name in (LAST, PREVIOUS):
        (config.run_dir / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"previous.pth \(4 bytes\) is truncated.* no other in .*--overwrite"):
        runs.fit(runs.config(drawn, resume="auto"))


def test_a_dry_run_writes_nothing(drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "vision_mamba.train"):
        runs.fit(runs.config(drawn, dry_run=True))
    assert "one step on random images has loss" in caplog.text and not (drawn / "output").exists()


def test_another_batch_size_goes_on_at_the_same_image(drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    interrupted(runs.config(drawn), 2)
    with caplog.at_level("WARNING", "vision_mamba.train"):
        runs.fit(runs.config(drawn, batch_size=2, resume="auto"))
    assert "8 images of the epoch were seen in 2 batches of 1 processes; going on at batch 4 of now" in caplog.text


def test_sizes_that_change_go_on_at_the_same_image(drawn: Path, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"train_img_sizes": (32, 64), "train_batch_sizes": (4, 2), "train_size_schedule": "progressive"}
    then, now = runs.config(drawn, **sizes), runs.config(drawn, train_batch_sizes=(2,), train_img_sizes=(32,))
    interrupted(then, 2)
    batches = epoch_batches(then, 12)
    batches.at(0, 0)
    seen = sum(len(batch) for batch in list(batches)[:2])
    assert seen != 2 * then.batch_size, "the first option is not what they had"
    with caplog.at_level("WARNING", "vision_mamba.train"):
        runs.fit(dataclasses.replace(now, resume="auto"))
    assert (
        f"{seen} images of the epoch were seen in 2 batches of 1 processes; going on at batch {seen // 2}"
        in caplog.text
    )


def test_images_before_a_batch_and_the_batch_after_them_belong_together() -> None:
    sizes = {"train_img_sizes": (32, 64, 96), "train_batch_sizes": (8, 4, 2), "train_size_schedule": "progressive"}
    config, plain = Config(batch_size=8, epochs=4, seed=1, **sizes), Config(batch_size=4, seed=1)
    for epoch in range(4):
        for batch in range(len(epoch_batches(config, 100, 0, 2))):
            seen = images_before(batch, epoch, config, 100, 2)
            assert batch_after(seen, epoch, config, 100, 2) == batch
            other = images_before(batch_after(seen, epoch, plain, 100, 1), epoch, plain, 100, 1)
            assert 0 <= min(seen, 100) - other < 4, "its batches hold 4"


def test_figures_for_tensorboard_where_it_is_installed(drawn: Path) -> None:
    config = runs.config(drawn, epochs=1, log_tensorboard=True)
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match=r"--log-tensorboard: .*pip install tensorboard"):
            runs.fit(config)
    else:
        runs.fit(config)
        assert list((config.run_dir / "tensorboard").iterdir())
