"""Checkpoint files: whole or not at all, and what is said of damaged and foreign ones."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from tests.train import runs
from vision_mamba.train import checkpoint
from vision_mamba.train.errors import CheckpointError, ConfigError
from vision_mamba.train.predict import load


@pytest.fixture
def trained(drawn: Path) -> Path:
    """A run of one epoch."""
    runs.fit(runs.config(drawn, epochs=1))
    return drawn


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 10 kB; writing more fails in the system, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    state = {"state_dict": {"a": torch.arange(3)}, "args": {"lr": 0.1, "scale": [0.1, 1], "aa": None}}
    checkpoint.save(state, [tmp_path / "a.pth", tmp_path / "b.pth"])
    for name in ("a.pth", "b.pth"):
        content = checkpoint.read(tmp_path / name)
        assert content["args"] == state["args"] and torch.equal(content["state_dict"]["a"], torch.arange(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "b.pth"]


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, small_files: None) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save({"epoch": 1}, [path])
    before = path.read_bytes()
    with pytest.raises(
        CheckpointError, match=r"last.pth cannot be written: File too large; it needs 0.4 MB, .* free"
    ) as e:
        checkpoint.save({"epoch": 2, "state_dict": {"a": torch.zeros(100_000)}}, [path])
    assert "the one written before is untouched" in str(e.value)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]


def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pth"
    checkpoint.save({"epoch": 1}, [path])

    def fails(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(CheckpointError, match=r"No space left on device"):
        checkpoint.save({"epoch": 2}, [path])
    assert checkpoint.read(path) == {"epoch": 1} and [entry.name for entry in tmp_path.iterdir()] == ["last.pth"]


def test_a_run_on_a_full_disk_stops_and_continues_when_there_is_room(trained: Path, small_files: None) -> None:
    run_dir = trained / "output" / "run"
    before = (run_dir / "last.pth").read_bytes()
    config = runs.config(trained, resume="auto")
    with pytest.raises(
        CheckpointError, match=r"cannot be written: File too large.*Make room, then continue with --resume"
    ):
        runs.fit(config)
    assert (run_dir / "last.pth").read_bytes() == before
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    assert runs.fit(config).epoch == 2


def test_a_missing_checkpoint_is_told_with_what_is_there(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run/lost.pth does not exist; .*run has best.pth, last.pth"):
        checkpoint.read(trained / "output" / "run" / "lost.pth")
    with pytest.raises(CheckpointError, match=r"run is a folder; .*run has best.pth, last.pth"):
        checkpoint.read(trained / "output" / "run")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_checkpoint_is_told_with_its_size(trained: Path, share: float) -> None:
    path = trained / "output" / "run" / "last.pth"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    what = "is empty" if share == 0 else "is truncated"
    with pytest.raises(CheckpointError, match=rf"last.pth \({path.stat().st_size:,} bytes\) {what}"):
        runs.fit(runs.config(trained, resume=str(path)))
    with pytest.raises(CheckpointError, match=what):
        load(str(path), torch.device("cpu"))


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    for name, content in (
        ("text.pth", b"hello there"),
        ("text.safetensors", b"hello there"),
        ("b.pth", b"bad words\n\n"),
        ("page.pth", b"# A heading"),  # unpickled, as any text is: an unsupported operand
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            CheckpointError, match=rf"{name} \(11 bytes\) is not a PyTorch file, or damaged(\.|: KeyError|: .+ )"
        ):
            checkpoint.read(tmp_path / name)


class Stranger:
    """Something that only Python can rebuild."""


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "config": Stranger()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds Python objects besides tensors, which could run code"):
        checkpoint.read(tmp_path / "a.pth")


def test_a_checkpoint_without_weights(tmp_path: Path) -> None:
    torch.save({"notes": "none", "lr": 1.0}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"holds no weights; its keys are notes, lr"):
        load(str(tmp_path / "a.pth"), torch.device("cpu"), "test_vmamba")


def test_a_foreign_checkpoint_lists_the_keys(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_vit", num_classes=2).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"does not fit model 'test_vmamba'") as caught:
        load(str(tmp_path / "vit.pth"), torch.device("cpu"), "test_vmamba")
    told = str(caught.value)
    assert "keys missing (" in told and "keys left over (" in told and "more)" in told and len(told) < 800


def test_a_foreign_checkpoint_cannot_be_resumed(drawn: Path) -> None:
    path = drawn / "foreign.pth"
    torch.save({"state_dict": timm.create_model("test_vit").state_dict()}, path)
    with pytest.raises(CheckpointError, match=r"has no entry 'classes', so it was not written by tools/train.py"):
        runs.fit(runs.config(drawn, resume=str(path)))


def test_a_checkpoint_of_another_model_is_told_by_name_and_shape(trained: Path) -> None:
    path = str(trained / "output" / "run" / "last.pth")
    wider = {"dims": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}
    with pytest.raises(CheckpointError, match=r"25 of another shape \(.*bias \(8,\) in the file, \(16,\) in the model"):
        runs.fit(runs.config(trained, resume=path, model_kwargs=wider, experiment="wider"))
    other = runs.config(trained, resume=path, model="test_vim", model_kwargs=None, experiment="vim")
    with pytest.raises(
        CheckpointError, match=r"does not fit model 'test_vim': it was trained as 'test_vmamba'; .*missing"
    ):
        runs.fit(other)


def test_classes_must_be_those_that_were_trained(trained: Path) -> None:
    for split in ("train", "val"):
        (trained / "images" / split / "left").rename(trained / "images" / split / "right")
    with pytest.raises(ConfigError, match=r"was trained on the classes \['left', 'upper'\], the data has \['right'"):
        runs.fit(runs.config(trained, resume="auto"))


def test_timm_loads_our_checkpoints(trained: Path) -> None:
    config = runs.config(trained)
    model = timm.create_model(
        config.model, num_classes=2, checkpoint_path=str(config.run_dir / "best.pth"), **config.model_kwargs
    )
    assert runs.same(dict(model.state_dict()), runs.weights(config.run_dir, "best.pth"))


def test_a_run_begins_from_given_weights(trained: Path) -> None:
    before = runs.weights(trained / "output" / "run")
    safetensors.torch.save_file(before, trained / "before.safetensors")
    for path in (trained / "output" / "run" / "last.pth", trained / "before.safetensors"):
        config = runs.config(trained, initial_checkpoint=str(path), lr=0.0, epochs=1, experiment=f"from{path.suffix}")
        runs.fit(config)
        assert runs.same(runs.weights(config.run_dir), before)


def test_given_weights_that_do_not_fit_are_refused(trained: Path) -> None:
    path = trained / "vit.pth"
    torch.save(timm.create_model("test_vit", num_classes=2).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"vit.pth does not fit model 'test_vmamba'"):
        runs.fit(runs.config(trained, initial_checkpoint=str(path), experiment="new"))
    with pytest.raises(CheckpointError, match=r"lost.pth does not exist"):
        runs.fit(runs.config(trained, initial_checkpoint=str(trained / "lost.pth"), experiment="new"))


def test_a_run_in_the_way_is_not_replaced_unasked(trained: Path) -> None:
    config = runs.config(trained, epochs=1)
    before = (config.run_dir / "last.pth").read_bytes()
    with pytest.raises(ConfigError, match=r"holds a run already; continue it with --resume auto"):
        runs.fit(config)
    assert (config.run_dir / "last.pth").read_bytes() == before
    assert runs.fit(dataclasses.replace(config, overwrite=True)).epoch == 1


def test_the_average_is_taken_where_there_is_one_and_it_is_wanted() -> None:
    last, average = {"a": torch.zeros(1)}, {"a": torch.ones(1)}
    for content in ({"state_dict": last, "state_dict_ema": average}, {"model": last, "model_ema": average}):
        assert checkpoint.weights(content, "x.pth")["a"] == 1
        assert checkpoint.weights(content, "x.pth", use_ema=False)["a"] == 0
    assert checkpoint.weights({"state_dict": last, "state_dict_ema": None}, "x.pth")["a"] == 0
