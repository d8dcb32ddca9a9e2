"""The training loop: steps, evaluation, saving, and stopping at any step without losing it."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from timm.utils import distribute_bn
from torch import nn

from vision_mamba.train import checkpoint
from vision_mamba.train.checkpoint import BEST, LAST, PREVIOUS
from vision_mamba.train.errors import CheckpointError, Interrupted, TrainError
from vision_mamba.train.guards import FiniteGuard, ImageGuard, collapsed
from vision_mamba.train.journal import Journal
from vision_mamba.train.learner import Learner
from vision_mamba.train.loader import Feed
from vision_mamba.train.options import Config
from vision_mamba.train.parallel import World, on_its_way
from vision_mamba.train.progress import Progress
from vision_mamba.train.signals import StopSignals

_log = logging.getLogger("vision_mamba.train")
T = TypeVar("T")


@dataclass
class Position:
    """Where a run stands: `epoch` epochs are done, and `batch` batches of the next one."""

    epoch: int = 0
    batch: int = 0
    trained: int = 0  # batches of the epoch in progress that changed the weights
    loss_sum: float = 0.0  # over these
    left_out: int = 0  # steps of the epoch in progress that did not, for they were not finite
    left_out_before: int = 0  # the same in the epochs that are done
    metric: float | None = None  # held-out accuracy in percent after the last epoch that is done
    best_metric: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0  # of training, over all the runs that took part


class Trainer:
    """One run: a model, its data, and all that must be saved to continue it.

    Args:
        learner: with the options. training, held_out: the images.
        extras: further entries of every checkpoint, such as the classes' names.
    """

    def __init__(
        self,
        learner: Learner,
        training: Feed,
        held_out: Feed,
        images: ImageGuard,
        journal: Journal,
        extras: dict[str, Any],
    ) -> None:
        self.learner, self.training, self.held_out = learner, training, held_out
        self.images, self.journal, self.extras = images, journal, extras
        self.finite = FiniteGuard(self.config.max_bad_steps)
        self.position = Position()
        self.rate: float | None = None  # images a second of the epoch in progress, loading included, evaluation not
        self._saved_at = time.perf_counter()

    @property
    def config(self) -> Config:
        return self.learner.config

    @property
    def world(self) -> World:
        return self.learner.world

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.learner.epochs

    def fit(self, progress: Progress) -> Position:
        """Train to the last epoch from wherever the run stands.

        Raises: Interrupted after a signal, when everything is saved; NonFiniteError; DataError; CheckpointError.
        """
        position = self.position
        self.journal.begin(position.epoch)
        self.learner.schedule(position.epoch, position.batch)
        self._saved_at = time.perf_counter()
        with StopSignals() as stop:
            while not self.done:
                label = f"epoch {position.epoch + 1}/{self.learner.epochs}"
                with progress.bar(label, len(self.training), position.batch) as bar:
                    self._train_epoch(stop, bar)
                    if position.epoch + 1 < self.learner.epochs:
                        self.training.begin(position.epoch + 1, 0)
                    measured = self._evaluate(stop)
                self._finish_epoch(measured, label)
        return position

    def _train_epoch(self, stop: StopSignals, bar: Any) -> None:
        """The batches of the epoch in progress that are still to be done."""
        position, interval = self.position, self.config.recovery_interval
        self.training.at(position.epoch, position.batch)
        self.learner.task.train()
        asked, self.rate = False, None
        seen, began = 0, time.perf_counter()
        groups = _groups(stop.until_asked(self.training), self.config.grad_accum_steps)
        group = next(groups, None)
        while group is not None:
            figures = on_its_way(self.learner.gradients(group, position.epoch, position.batch))
            following = next(groups, None)  # is copied to the device while that computes
            loss, norm = figures()
            asked = self._step(len(group), loss, norm, stop)
            images = self.world.size * sum(len(targets) for _, targets in group)
            seen += images
            self.rate = seen / (time.perf_counter() - began)
            bar.advance(images, len(group), loss=position.loss_sum / max(1, position.trained), lr=self.learner.lr)
            if asked or (self.world.size == 1 and stop.signum is not None):
                break
            if interval and self.learner.done(0, position.batch) % interval == 0:
                self.save()
            group = following
        self._stop_if(asked or self._asked(stop), stop)

    def _step(self, batches: int, loss: float, norm: float, stop: StopSignals) -> bool:
        """Change the weights if the processes agree that they may; returns whether one was asked to stop."""
        position, learner = self.position, self.learner
        told = self.world.total(loss, float(stop.signum is not None), self.images.look())
        loss, asked, bad = told[0] / self.world.size, told[1] > 0, round(told[2])
        try:
            self.images.judge(bad)
        except TrainError:
            learner.discard()
            self.save()
            raise
        passes = self.finite.passes(loss, norm, learner.overflows)
        step = f"step {position.batch // self.config.grad_accum_steps + 1} of epoch {position.epoch + 1}"
        lr = learner.lr
        position.batch += batches
        if passes:
            learner.apply(position.epoch, position.batch)
            position.trained += batches
            position.loss_sum += loss * batches
        else:
            learner.discard()
            position.left_out += 1
        learner.schedule(position.epoch, position.batch)
        if not passes:
            self.finite.tell(step, loss, norm, lr, position.left_out, self._good_checkpoint())
        return asked

    def _good_checkpoint(self) -> str:
        """Save the weights if they are sound and this is the last step that may be left out; say what there is."""
        if self.position.left_out <= self.finite.limit:
            return ""
        path = self.run_dir / LAST
        if self.world.total(float(not self.learner.sound()))[0] == 0:
            self.save()
            return f"the state before them is in {path}"
        there = f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        return f"the weights are damaged, so they are not saved; {there}"

    @torch.no_grad()
    def _evaluate(self, stop: StopSignals) -> dict[str, float]:
        """Loss and accuracies on the held-out images."""
        learner, world = self.learner, self.world
        if world.size > 1 and self.config.dist_bn and not self.config.fsdp:
            for module in (learner.model, learner.task.get_trainable_module(ema=True)):
                if module is not None:
                    distribute_bn(module, world.size, self.config.dist_bn == "reduce")
        model = learner.eval_model
        assert isinstance(model, nn.Module)
        evaluator = learner.task.create_evaluator(max_samples=self.held_out.valid)
        model.eval()
        even = world.size == 1 or self.held_out.valid is not None  # else processes have different numbers of batches
        for images, targets in stop.until_asked(self.held_out):
            with learner.autocast:
                output = model(images)
            evaluator.update(output, targets)
            if even and self._asked(stop):
                break
        self._stop_if(self._asked(stop), stop)
        try:
            self.images.judge(round(world.total(self.images.look())[0]))
        except TrainError:
            self.save()  # the epoch is trained, if not measured
            raise
        return dict(evaluator.compute(distributed=world.size > 1))

    def _finish_epoch(self, measured: dict[str, float], label: str) -> None:
        """Write down an epoch that is trained and evaluated, and begin the next."""
        position, accuracy = self.position, measured["top1"]
        best = position.best_metric is None or accuracy > position.best_metric
        if collapsed(accuracy, position.best_metric, self.learner.model.num_classes):  # type: ignore[arg-type]
            _log.error(
                "%s: held-out accuracy fell to %.2f %%, which is near chance, after %.2f %% in epoch %d. The run goes "
                "on; consider going back to %s with a lower --lr or with --clip-grad 1.",
                label, accuracy, position.best_metric, position.best_epoch, self.run_dir / BEST,
            )  # fmt: skip
        train_loss = position.loss_sum / max(1, position.trained)
        self.journal.epoch(position.epoch, {"loss": train_loss, "images_per_s": self.rate}, measured, self.learner.lr)
        position.metric, position.left_out_before = accuracy, position.left_out_before + position.left_out
        position.epoch, position.batch, position.left_out = position.epoch + 1, 0, 0
        position.trained, position.loss_sum = 0, 0.0
        if best:
            position.best_metric, position.best_epoch = accuracy, position.epoch
        self.learner.schedule(position.epoch, 0)
        self.save(*([BEST] if best else []))
        _log.info(
            "%s: loss %.4f, held-out loss %.4f, held-out accuracy %.2f %% (best %.2f %%), %.0f s",
            label, train_loss, measured["loss"], accuracy, position.best_metric, position.seconds,
        )  # fmt: skip

    def _asked(self, stop: StopSignals) -> bool:
        """Whether any process was asked to stop."""
        return self.world.total(float(stop.signum is not None))[0] > 0

    def _stop_if(self, asked: bool, stop: StopSignals) -> None:
        if asked:
            self.save()
            raise Interrupted(stop.signum or signal.SIGTERM, str(self.run_dir / LAST))

    def save(self, *also: str) -> None:
        """Write the last checkpoint, and the same under other names; every process must take part.

        Raises: CheckpointError in all processes if the first one cannot write.
        """
        now = time.perf_counter()
        self.position.seconds, self._saved_at = self.position.seconds + now - self._saved_at, now
        state, failed = self.state(), None
        if self.world.primary:
            try:
                checkpoint.save(state, [self.run_dir / name for name in (LAST, *also)], self.run_dir / PREVIOUS)
            except CheckpointError as error:
                failed = error
        if (failed := self.world.told(failed)) is not None:
            raise failed

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "arch": self.config.model,
            **asdict(self.position),
            **self.learner.state(),
            "args": self.config.plain(),
            "processes": self.world.size,
            **self.extras,
        }

    def restore(self, content: dict[str, Any], path: str | Path) -> None:
        """Continue where a checkpoint left off.

        Raises: CheckpointError if it is not one of this run's model.
        """
        self.learner.restore(content, path)
        self.position = Position(**{key: checkpoint.entry(content, key, path) for key in asdict(self.position)})


def _groups(batches: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many batches, the last one of those that are left."""
    iterator = iter(batches)
    while group := list(itertools.islice(iterator, size)):
        yield group
