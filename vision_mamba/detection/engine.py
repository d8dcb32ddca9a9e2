"""The training loop of a detector: steps, evaluation, saving, and stopping at any step without losing it."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vision_mamba.detection import pictures
from vision_mamba.detection.coco import CocoSet
from vision_mamba.detection.loader import together
from vision_mamba.detection.metrics import Found, measure, results
from vision_mamba.detection.options import Config
from vision_mamba.train import checkpoint
from vision_mamba.train.errors import CheckpointError, Interrupted, NonFiniteError
from vision_mamba.train.parallel import World
from vision_mamba.train.progress import Progress
from vision_mamba.train.seeds import seed_step
from vision_mamba.train.signals import StopSignals

_log = logging.getLogger("vision_mamba.detection")
T = TypeVar("T")
LAST, BEST, BEFORE_NON_FINITE, SUMMARY = "last.pth", "best.pth", "before_non_finite.pth", "summary.csv"


@dataclass
class Position:
    """Where a run stands: `epoch` epochs are done, and `batch` steps of the next one."""

    epoch: int = 0
    batch: int = 0
    steps: int = 0  # of an epoch, to tell whether `batch` still means the same
    loss_sum: float = 0.0  # over the steps of the epoch in progress
    measured: dict[str, Any] = field(default_factory=dict)  # the figures of the last evaluation
    best: float = -1.0  # greatest AP so far: of the masks where there are any
    best_epoch: int | None = None
    seconds: float = 0.0  # of training and evaluation, over all the processes that took part


def schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Step -> factor of the learning rate, with so many steps an epoch.

    >>> rate = schedule(Config(warmup_steps=10, warmup_factor=0.1, epochs=12, decay_milestones=(8, 11)), 100)
    >>> [round(rate(step), 4) for step in (0, 5, 10, 799, 800, 1100)]
    [0.1, 0.55, 1.0, 1.0, 0.1, 0.01]
    """
    falls = [round(milestone * steps) for milestone in config.decay_milestones]

    def factor(step: int) -> float:
        risen = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
        warm = config.warmup_factor + (1 - config.warmup_factor) * risen
        if config.sched == "cosine":
            return warm * (1 + math.cos(math.pi * min(1.0, step / (config.epochs * steps)))) / 2
        return warm * config.decay_rate ** sum(step >= fall for fall in falls)

    return factor


class Trainer:
    """One run: a detector, its data, and all that must be saved to continue it.

    Args:
        config: the options.
        model: a detector of `create_detector`, on the world's device.
        train_loader: of `training_loader`. eval_loader: of `held_out_loader`.
        extras: further entries of every checkpoint.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        train_loader: DataLoader,
        eval_loader: DataLoader,
        world: World,
        extras: dict[str, Any],
    ) -> None:
        self.config, self.model, self.world, self.extras = config, model, world, extras
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.held_out: CocoSet = eval_loader.dataset  # type: ignore[assignment]
        self.position = Position(steps=len(train_loader))
        backbone: Any = model.backbone
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=backbone.no_weight_decay())
        self.optimizer = create_optimizer_v2(groups, config.opt, config.lr)
        self.rate = schedule(config, len(train_loader))
        self.autocast = torch.autocast(world.device.type, torch.bfloat16, enabled=config.amp)
        self.parallel = _parallel(model, world)
        self._saved_at = time.perf_counter()

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def lr(self) -> float:
        done = self.position.epoch * len(self.train_loader) + self.position.batch
        return self.config.lr * self.rate(done)

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.config.epochs

    def fit(self, progress: Progress) -> Position:
        """Train to the last epoch from wherever the run stands, and draw some held-out images.

        Raises: Interrupted after a signal, when everything is saved; NonFiniteError; CheckpointError; DataError.
        """
        position, config = self.position, self.config
        self._saved_at = time.perf_counter()
        with StopSignals() as stop:
            while not self.done:
                label = f"epoch {position.epoch + 1}/{config.epochs}"
                with progress.bar(label, len(self.train_loader), position.batch) as bar:
                    self._train_epoch(stop, bar)
                loss = position.loss_sum / len(self.train_loader)
                told = f"{label}: loss {loss:.4f}"
                if (position.epoch + 1) % config.eval_interval == 0 or position.epoch + 1 == config.epochs:
                    position.measured = self.evaluate(progress, stop)
                    told += "".join(f", {name} {value:.3f}" for name, value in position.measured.items()
                                    if value is not None and "_" not in name.removeprefix("mask_"))  # fmt: skip
                self._finish_epoch(loss)
                _log.info("%s, %.0f s", told, position.seconds)
        if config.samples and self.world.primary:
            pictures.write(self.scenes(config.samples), self.held_out.names, self.run_dir / "samples.png")
        return position

    def _train_epoch(self, stop: StopSignals, bar: Any) -> None:
        """The steps of the epoch in progress that are still to be done."""
        position, config = self.position, self.config
        self.train_loader.batch_sampler.at(position.epoch, position.batch)  # type: ignore[union-attr]
        self.model.train()
        for images, targets in stop.until_asked(self.train_loader):
            self._stop_if_asked(stop)
            loss = self._step(images, targets)
            position.batch += 1
            position.loss_sum += loss
            bar.advance(len(images) * self.world.size, loss=position.loss_sum / position.batch, lr=self.lr)
            if config.recovery_interval and position.batch % config.recovery_interval == 0:
                self.save()
        self._stop_if_asked(stop)

    def _step(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
        """One update of the weights; none if loss or gradient is not finite."""
        device, position = self.world.device, self.position
        seed_step(self.config.seed, self.world.rank, position.epoch, position.batch)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.optimizer.zero_grad()
        with self.autocast:
            losses = self.parallel([image.to(device) for image in images], _moved(targets, device))
            loss = torch.stack([part.float() for part in losses.values()]).sum()
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_grad or math.inf)
        value, size = torch.stack([loss.detach(), norm.float()]).tolist()
        # The norm is of averaged gradients, so it is not finite in all processes or in none.
        if not math.isfinite(size) or not math.isfinite(value):
            self._refuse(value, size, [int(target["image_id"]) for target in targets], losses)
        self.optimizer.step()
        return value

    def _refuse(self, loss: float, norm: float, image_ids: list[int], losses: dict[str, Tensor]) -> None:
        """Stop at a loss or gradient that is not finite, with the state from before the step saved apart."""
        self.optimizer.zero_grad()
        path = self.run_dir / BEFORE_NON_FINITE
        self.save(BEFORE_NON_FINITE, last=False)
        parts = ", ".join(f"{name} {float(part.detach()):.3g}" for name, part in losses.items())
        raise NonFiniteError(
            f"step {self.position.batch + 1} of epoch {self.position.epoch + 1}, images {image_ids}: the loss is "
            f"{loss} ({parts}), the norm of its gradient {norm}, at learning rate {self.lr:.3e}; the state before that "
            f"step is in {path}. Lower --lr, limit the gradient with --clip-grad 1, or try --no-amp, then --resume it."
        )

    @torch.no_grad()
    def evaluate(self, progress: Progress, stop: StopSignals | None = None) -> dict[str, float | None]:
        """The figures of `metrics.measure` on the held-out images, by all processes together."""
        self.model.eval()
        found: Found = []
        alone = stop if self.world.size == 1 else None  # together, none may leave the others waiting
        with progress.bar("held-out images", len(self.eval_loader)) as bar:
            for images, targets in alone.until_asked(self.eval_loader) if alone else self.eval_loader:
                with self.autocast:
                    detections = self.model([image.to(self.world.device) for image in images])
                found += results(detections, [int(t["image_id"]) for t in targets], self.held_out.categories)
                bar.advance(len(images))
        if stop is not None:
            self._stop_if_asked(stop)
        every = [entry for part in _gathered(found, self.world) for entry in part]
        return measure(self.held_out, every, self.held_out.masks)

    @torch.no_grad()
    def scenes(self, count: int) -> list[pictures.Scene]:
        """The first held-out images, with what is on them and what is found."""
        self.model.eval()
        images, targets = together([self.held_out[i] for i in range(min(count, len(self.held_out)))])
        with self.autocast:
            found = [self.model([image.to(self.world.device)])[0] for image in images]
        kept = ("boxes", "labels", "masks")
        truths = [{name: target[name] for name in kept if name in target} for target in targets]
        return [pictures.Scene(*scene) for scene in zip(images, truths, _moved(found, "cpu"), strict=True)]

    def _finish_epoch(self, loss: float) -> None:
        """Write down an epoch that is trained, and evaluated if its turn has come, and begin the next."""
        position = self.position
        position.epoch, position.batch, position.loss_sum = position.epoch + 1, 0, 0.0
        main = position.measured.get("mask_AP" if self.held_out.masks else "AP")
        evaluated = position.epoch % self.config.eval_interval == 0 or self.done
        best = evaluated and (main or 0.0) > position.best
        if best:
            position.best, position.best_epoch = main or 0.0, position.epoch
        self.save(*([BEST] if best else []))
        if evaluated and self.world.primary:
            self._write_row({"epoch": position.epoch, "loss": loss, "seconds": position.seconds, **position.measured})

    def _write_row(self, row: dict[str, Any]) -> None:
        path = self.run_dir / SUMMARY
        new = not path.exists()
        with open(path, "a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)

    def _stop_if_asked(self, stop: StopSignals) -> None:
        """Save and stop if a signal has reached any of the processes."""
        signum, asked = self.world.total(stop.signum or 0, stop.signum is not None)
        if asked:
            self.save()
            raise Interrupted(round(signum / asked), str(self.run_dir / LAST))

    def save(self, *also: str, last: bool = True) -> None:
        """Write the last checkpoint, and the same under other names, in the first process.

        Random numbers are a function of the position, so no generator's state is among what is written.
        """
        now = time.perf_counter()
        self.position.seconds, self._saved_at = self.position.seconds + now - self._saved_at, now
        if self.world.primary:
            names = (LAST, *also) if last else also
            checkpoint.save(self.state(), [self.run_dir / name for name in names])

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "arch": self.config.model,
            **asdict(self.position),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "args": self.config.plain(),
            **self.extras,
        }

    def restore(self, content: dict[str, Any], path: str | Path) -> None:
        """Continue where a checkpoint left off.

        Raises: CheckpointError if it is not one of this run's detector.
        """

        def entry(key: str) -> Any:
            return checkpoint.entry(content, key, path)

        arch = self.config.model
        checkpoint.load(self.model, checkpoint.weights(content, path), path, arch, entry("arch"))
        try:
            self.optimizer.load_state_dict(entry("optimizer"))
        except ValueError as error:
            raise CheckpointError(f"checkpoint {path} holds the state of another optimizer: {error}.") from error
        self.position = Position(**{key: entry(key) for key in asdict(self.position)})
        if self.position.steps != len(self.train_loader) and self.position.batch:
            _log.warning("an epoch had %d steps so far, has %d from here on; the one in progress begins again",
                         self.position.steps, len(self.train_loader))  # fmt: skip
            self.position.batch, self.position.loss_sum = 0, 0.0
        self.position.steps = len(self.train_loader)


def _parallel(model: nn.Module, world: World) -> nn.Module:
    """The model, with gradients averaged over the processes."""
    if world.size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, [world.device] if world.device.type == "cuda" else None)


def _gathered(item: T, world: World) -> list[T]:
    """Every process's item, in each of them."""
    items: list[Any] = [item] * world.size
    if world.size > 1:
        dist.all_gather_object(items, item)
    return items


def _moved(targets: list[dict[str, Tensor]], device: torch.device | str) -> list[dict[str, Tensor]]:
    return [{name: value.to(device) for name, value in target.items()} for target in targets]
