"""Runs that are stopped in the middle end with the very weights of runs that are not."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.utils import ModelEmaV3

from tests.train import runs
from tests.train.runs import STEPS
from vision_mamba.train import model as models
from vision_mamba.train.checkpoint import LAST
from vision_mamba.train.engine import Position
from vision_mamba.train.errors import CheckpointError, Interrupted
from vision_mamba.train.learner import Learner
from vision_mamba.train.options import Config
from vision_mamba.train.parallel import World
from vision_mamba.train.progress import Bar, Progress
from vision_mamba.train.run import prepare, train
from vision_mamba.train.signals import StopSignals


class Stopping(Progress):
    """Sends this process a signal after so many steps."""

    def __init__(self, after: int, signum: int) -> None:
        self.left, self.signum = after, signum

    @contextlib.contextmanager
    def bar(self, label: str, total: int, done: int = 0) -> Iterator[Bar]:
        yield self

    def advance(self, items: int, steps: int = 1, **figures: float) -> None:
        if figures:  # a step of training, not the check of the images
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.signum)


def interrupted(config: Config, after: int, signum: int = signal.SIGINT) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        train(config, prepare(config), Stopping(after, signum))
    return caught.value


@pytest.fixture
def whole(drawn: Path) -> tuple[Position, Path]:
    """A run that nobody stopped."""
    config = runs.config(drawn, experiment="whole")
    return runs.fit(config), config.run_dir


def rows(run_dir: Path) -> list[dict[str, str]]:
    """What was written down of the epochs, but for how fast they went."""
    with open(run_dir / "summary.csv", newline="") as file:
        return [{name: row[name] for name in row if name != "train_images_per_s"} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "after, options",
    [
        (1, {}),
        (STEPS, {}),  # the epoch is trained, not yet evaluated
        (STEPS + 2, {"workers": 1}),
    ],
)
def test_a_stopped_run_ends_like_one_that_was_not(
    drawn: Path, whole: tuple[Position, Path], after: int, options: dict[str, Any]
) -> None:
    config = runs.config(drawn, **options)
    stopped = interrupted(config, after)
    assert stopped.signum == signal.SIGINT
    saved = torch.load(stopped.checkpoint, weights_only=True)
    assert saved["epoch"] * STEPS + saved["batch"] == after
    result = runs.fit(runs.config(drawn, resume="auto"))
    assert runs.same(runs.weights(config.run_dir), runs.weights(whole[1]))
    assert runs.same(runs.weights(config.run_dir, "best.pth"), runs.weights(whole[1], "best.pth"))
    assert result.metric == whole[0].metric and result.best_epoch == whole[0].best_epoch
    assert rows(config.run_dir) == rows(whole[1])


def test_an_epoch_done_twice_stands_once_in_the_summary(drawn: Path, whole: tuple[Position, Path]) -> None:
    """As after a loss of power between the summary and the checkpoint."""
    early = Path(interrupted(runs.config(drawn), STEPS + 1).checkpoint).read_bytes()
    for _ in range(2):
        (drawn / "output" / "run" / LAST).write_bytes(early)
        runs.fit(runs.config(drawn, resume="auto"))
    assert rows(drawn / "output" / "run") == rows(whole[1])


def test_the_average_of_the_weights_and_float16_survive_a_stop(drawn: Path) -> None:
    options = {"model_ema": True, "model_ema_decay": 0.5, "model_ema_warmup": True, "amp": True, "amp_dtype": "float16"}
    whole = runs.config(drawn, experiment="whole", **options)
    runs.fit(whole)
    config = runs.config(drawn, **options)
    interrupted(config, STEPS + 1)
    runs.fit(runs.config(drawn, resume="auto", **options))
    one, other = (torch.load(c.run_dir / LAST, weights_only=True) for c in (config, whole))
    assert runs.same(one["state_dict"], other["state_dict"]) and runs.same(
        one["state_dict_ema"], other["state_dict_ema"]
    )
    assert not runs.same(one["state_dict"], one["state_dict_ema"])
    assert one["amp_scaler"] == other["amp_scaler"] and one["amp_scaler"]


def test_a_finished_run_is_left_as_it_is(drawn: Path, whole: tuple[Position, Path]) -> None:
    before = (whole[1] / LAST).read_bytes()
    result = runs.fit(runs.config(drawn, experiment="whole", resume="auto"))
    assert result == whole[0] and (whole[1] / LAST).read_bytes() == before


def test_more_epochs_continue_a_finished_run_and_say_what_differs(
    drawn: Path, whole: tuple[Position, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "vision_mamba.train"):
        result = runs.fit(runs.config(drawn, experiment="whole", resume="auto", epochs=3))
    assert result.epoch == 3 and len(rows(whole[1])) == 3
    assert "--epochs was 2 so far, is 3 from here on" in caplog.messages


def test_another_optimizer_does_not_go_on_with_the_state_of_this_one(drawn: Path, whole: tuple[Position, Path]) -> None:
    shutil.copytree(whole[1], drawn / "output" / "run")
    with pytest.raises(CheckpointError, match=r"the state of another optimizer, adamw; keep --opt adamw, or begin"):
        runs.fit(runs.config(drawn, resume="auto", epochs=3, opt="sgd"))


def test_the_seed_settles_the_run(drawn: Path, whole: tuple[Position, Path]) -> None:
    runs.fit(runs.config(drawn))
    runs.fit(runs.config(drawn, experiment="other", seed=4))
    assert runs.same(runs.weights(drawn / "output" / "run"), runs.weights(whole[1]))
    assert not runs.same(runs.weights(drawn / "output" / "other"), runs.weights(whole[1]))


def test_algorithms_repeat_to_the_last_bit_where_asked_for(drawn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = [], Learner.gradients

    def gradients(*arguments: Any) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(*arguments)

    monkeypatch.setattr(Learner, "gradients", gradients)
    for wanted in (True, False):
        runs.fit(runs.config(drawn, epochs=1, deterministic=wanted, overwrite=True))
        assert not torch.are_deterministic_algorithms_enabled(), "as before"
    assert seen == [True] * STEPS + [False] * STEPS


def follow(process: Any, line: str) -> str:
    """What a process writes to stderr, until a line like this."""
    told = ""
    for text in process.stderr:
        told += text
        if re.search(line, text):
            return told
    raise AssertionError(f"no line like {line!r} in:\n{told}")


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_prints_the_command_that_continues_and_exits_with_its_status(
    drawn: Path, signum: int, status: int
) -> None:
    config = runs.config(drawn, epochs=100, log_interval=1, sched="constant")  # so long that the signal comes in time
    process = runs.start(*runs.flags(config))
    follow(process, "epoch 1/100 1/3")
    process.send_signal(signum)
    told = process.stderr.read()
    assert process.wait() == status, told
    command = re.search(r"^continue with: (.*)$", told, re.MULTILINE)
    assert command is not None, told
    python, script, *words = shlex.split(command[1])
    assert (python, script) == ("python", "tools/train.py")
    position = torch.load(config.run_dir / LAST, weights_only=True)
    last = position["epoch"] + 1
    again = runs.start(*words, "--epochs", str(last))
    out, told = again.communicate()
    assert again.returncode == 0, told
    assert re.fullmatch(r"test_vmamba held-out accuracy \d+\.\d\d %\n", out)
    straight = runs.config(drawn, epochs=last, sched="constant", experiment="straight")
    runs.fit(straight)
    assert runs.same(runs.weights(config.run_dir), runs.weights(straight.run_dir))


def test_a_run_that_cannot_save_ends_with_its_loading_processes(drawn: Path) -> None:
    config = runs.config(drawn, epochs=100, log_interval=1, workers=1, sched="constant")
    process = runs.start(*runs.flags(config))
    try:
        follow(process, "epoch 1/100: ")
        shutil.rmtree(config.run_dir)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 1 and "last.pth cannot be written: No such file or directory" in told, told


def test_a_second_signal_stops_at_once() -> None:
    # What a shell runs in the background ignores this signal from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopSignals() as stop, pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signum == signal.SIGINT, "the first is remembered"
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_is_told_apart(drawn: Path) -> None:
    assert interrupted(runs.config(drawn), 1, signal.SIGTERM).signum == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the handlers are put back"


def test_the_average_moves_as_timms_does() -> None:
    config = Config(model="test_resnet", model_ema=True, model_ema_decay=0.7, model_ema_warmup=True, sched="none")
    torch.manual_seed(0)
    model = timm.create_model(config.model, num_classes=3)  # its batch norms have buffers of both kinds
    learner = Learner(config, model, World(torch.device("cpu")), 1, models.data_config(model, {}))
    theirs = ModelEmaV3(model, decay=0.7, use_warmup=True)
    for step in range(1, 4):
        learner.task.train()
        learner.gradients([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))], 0, step)
        learner.apply(0, step)
        theirs.update(model, step)
    assert runs.same(learner.state()["state_dict_ema"], theirs.module.state_dict())
    assert not runs.same(learner.state()["state_dict_ema"], model.state_dict())
