"""Training detectors: runs, interruption and continuation, several processes, and the command."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console

from tests.detection import drawn
from tools import train_detection
from vision_mamba.detection.engine import LAST, Position, Trainer
from vision_mamba.detection.options import Config
from vision_mamba.detection.run import load, train
from vision_mamba.train import checkpoint
from vision_mamba.train.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from vision_mamba.train.parallel import World
from vision_mamba.train.progress import Progress

STEPS = 4  # of an epoch


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return drawn.draw(tmp_path_factory.mktemp("data"), train=8, val=3)


def config(data: Path, output: Path, **options: Any) -> Config:
    small = Config(
        data_dir=str(data),
        train_split="train",
        val_split="val",
        model="test_vmamba",
        model_kwargs={"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        drop_path=0.2,
        detector="faster_rcnn",
        fpn_channels=16,
        head_channels=16,
        detector_kwargs={"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 10},
        lr=1e-3,
        warmup_steps=2,
        epochs=2,
        batch_size=2,
        min_size=(64,),
        max_size=96,
        workers=0,
        device="cpu",
        output=str(output),
        experiment="run",
        samples=0,
        eval_interval=2,
    )
    return dataclasses.replace(small, **options)


def fit(config: Config, begin_from: Path | None = None) -> Position:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return train(config, begin_from, Progress(Console(file=io.StringIO())), World(torch.device("cpu")))


def weights(config: Config) -> dict[str, torch.Tensor]:
    return torch.load(config.run_dir / LAST, weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_interrupted_run_goes_on_to_the_same_weights(data: Path, tmp_path: Path, one_thread, monkeypatch) -> None:
    whole = config(data, tmp_path / "whole")
    ended = fit(whole)
    assert (ended.epoch, ended.batch, ended.steps) == (2, 0, STEPS) and set(ended.measured) >= {"AP", "AP50", "AR"}
    assert len((whole.run_dir / "summary.csv").read_text().splitlines()) == 2  # the heading, one evaluation

    halved, step, done = config(data, tmp_path / "halved"), Trainer._step, []

    def stopping(self: Trainer, *batch: Any) -> float:
        done.append(step(self, *batch))
        if len(done) == STEPS + 1:  # in the middle of the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return done[-1]

    monkeypatch.setattr(Trainer, "_step", stopping)
    with pytest.raises(Interrupted) as stopped:
        fit(halved)
    assert stopped.value.signum == signal.SIGTERM and len(done) == STEPS + 1
    content = checkpoint.read(stopped.value.checkpoint)
    assert (content["epoch"], content["batch"]) == (1, 1)
    torch.manual_seed(99)  # where the generators stand must not matter
    assert fit(halved, Path(stopped.value.checkpoint)).measured == ended.measured
    assert len(done) == 2 * STEPS and same(weights(whole), weights(halved))

    detector, names = load(halved.run_dir / LAST)
    assert names == ["light", "dark"] and same(detector.state_dict(), weights(whole))
    with pytest.raises(CheckpointError, match="does not fit model"):
        fit(config(data, tmp_path / "halved", fpn_channels=24), halved.run_dir / LAST)


def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path, one_thread) -> None:
    run = config(data, tmp_path, lr=1e20, warmup_steps=0)
    with pytest.raises(NonFiniteError, match=r"images \[\d+, \d+\]: the loss is .*Lower --lr"):
        fit(run)
    assert (run.run_dir / "before_non_finite.pth").exists() and not (run.run_dir / LAST).exists()


def test_weights_of_a_classifier_begin_a_run_and_others_are_refused(data: Path, tmp_path: Path) -> None:
    import timm

    from vision_mamba.detection.run import build

    classifier = timm.create_model("test_vmamba", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "c.pth")
    run = config(data, tmp_path, initial_checkpoint=str(tmp_path / "c.pth"))
    body = build(run, 2).backbone.body.state_dict()  # type: ignore[union-attr]
    theirs = classifier.state_dict()
    assert body and all(torch.equal(tensor, theirs[name.removeprefix("model.")]) for name, tensor in body.items())
    with pytest.raises(CheckpointError, match=r"c.pth for test_vmamba"):
        build(dataclasses.replace(run, model_kwargs=None), 2)
    run = dataclasses.replace(run, initial_checkpoint=None)
    with pytest.raises(ConfigError, match="faster_rcnn takes no argument 'box_nms'; did you mean 'box_nms_thresh'"):
        build(dataclasses.replace(run, detector_kwargs={"box_nms": 1}), 2)
    with pytest.raises(ConfigError, match=r"--model-kwargs: .*no_such"):
        build(dataclasses.replace(run, model_kwargs={"no_such": 1}), 2)
    with pytest.raises(ConfigError, match="has no map of stride 3"):
        build(dataclasses.replace(run, strides=(3, 8)), 2)


def test_the_command_trains_records_and_draws(data: Path, tmp_path: Path, one_thread, capsys, monkeypatch) -> None:
    run = config(
        data, tmp_path, detector="mask_rcnn", amp=True, epochs=1, samples=2, record=str(tmp_path / "record.jsonl")
    )
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run.plain()))
    words = ["--config", str(tmp_path / "c.yaml")]
    assert train_detection.main(words) == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines())
    record = json.loads((tmp_path / "record.jsonl").read_text())
    assert {f"{record[name]:.4f}" == told[name] for name in ("AP", "AP50", "mask_AP")} == {True}
    assert (record["case"], record["model"], record["steps"]) == ("run", "test_vmamba", STEPS)
    with Image.open(run.run_dir / "samples.png") as sheet:
        assert sheet.width > 500
    assert train_detection.main(words) == 2 and "holds a run already" in capsys.readouterr().err
    assert train_detection.main([*words, "--overwrite", "--val-split", "none_such"]) == 1


def process(rank: int, words: list[str], port: int, told: Path) -> None:
    """One of two, as torchrun starts it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update(
        {key: str(value) for key, value in places.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with open(told, "w") as file, contextlib.redirect_stdout(file):
        status = train_detection.main(words)
    sys.exit(status)


def test_two_processes_train_one_detector(data: Path, tmp_path: Path, one_thread) -> None:
    """They see other images, keep the same weights, and measure together what one process measures alone."""
    run = config(data, tmp_path, epochs=1, detector="retinanet", strides=(8, 16), detector_kwargs=None)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(run.plain()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words, told = ["--config", str(tmp_path / "c.yaml")], [tmp_path / "0.txt", tmp_path / "1.txt"]
    both = [multiprocessing.get_context("fork").Process(target=process, args=(i, words, port, told[i])) for i in (0, 1)]
    for one in both:
        one.start()
    for one in both:
        one.join(300)
    assert [one.exitcode for one in both] == [0, 0]
    assert told[0].read_text().startswith("AP ") and not told[1].read_text()
    content = checkpoint.read(run.run_dir / LAST)
    assert content["steps"] == STEPS // 2
    assert _measured(run, run.run_dir / LAST) == content["measured"]


def _measured(config: Config, path: Path) -> dict[str, Any]:
    from vision_mamba.detection.loader import held_out_loader, training_loader
    from vision_mamba.detection.run import data as open_data

    world = World(torch.device("cpu"))
    train_set, held_out = open_data(config)
    loaders = training_loader(train_set, 2, 0, 0, world), held_out_loader(held_out, 2, 0, world)
    trainer = Trainer(config, load(path)[0], *loaders, world, {})
    return trainer.evaluate(Progress(Console(file=io.StringIO())))
