"""The training loop: steps, evaluation, saving, and stopping at any step without losing it."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad, trim_summary, update_summary
from torch import Tensor, nn

from vision_mamba.train import checkpoint
from vision_mamba.train.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from vision_mamba.train.options import Config
from vision_mamba.train.progress import Progress
from vision_mamba.train.signals import StopSignals

_log = logging.getLogger("vision_mamba.train")
LAST, BEST, BEFORE_NON_FINITE = "last.pth", "best.pth", "before_non_finite.pth"


@dataclass
class Position:
    """Where a run stands: `epoch` epochs are done, and `batch` batches of the next one."""

    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0  # over the batches of the epoch in progress
    metric: float | None = None  # held-out accuracy in percent after the last epoch that is done
    best_metric: float | None = None
    best_epoch: int | None = None
    seconds: float = 0.0  # of training, over all the processes that took part


class Trainer:
    """One run: a model, its data, and all that must be saved to continue it.

    Args:
        config: the options. model: on its device.
        train_loader: from `create_loader` with augmentation. eval_loader: of the held-out images.
        extras: further entries of every checkpoint, such as the classes' names.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        train_loader: Any,
        eval_loader: Any,
        device: torch.device,
        extras: dict[str, Any],
    ) -> None:
        self.config, self.model, self.device, self.extras = config, model, device, extras
        self.train_loader, self.eval_loader = train_loader, eval_loader
        self.position = Position()
        self._saved_at = time.perf_counter()
        mixes = config.mixup > 0 or config.cutmix > 0
        self.mixup = (
            Mixup(
                mixup_alpha=config.mixup,
                cutmix_alpha=config.cutmix,
                prob=config.mixup_prob,
                switch_prob=config.mixup_switch_prob,
                label_smoothing=config.smoothing,
                num_classes=model.num_classes,
            )
            if mixes
            else None
        )
        loss = {"soft_targets": True} if mixes else {"smoothing": config.smoothing}
        self.task = ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
        if config.model_ema:
            self.task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        try:
            self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(config), **(config.opt_kwargs or {}))
        except TypeError as error:
            raise ConfigError(f"--opt-kwargs: {config.opt} does not take them: {error}.") from error
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            sched=config.sched,
            num_epochs=config.epochs,
            warmup_epochs=config.warmup_epochs,  # type: ignore[arg-type]
            warmup_lr=config.warmup_lr,
            min_lr=config.min_lr,
            decay_epochs=config.decay_epochs,
            decay_milestones=list(config.decay_milestones),  # type: ignore[arg-type]
            decay_rate=config.decay_rate,
            step_on_epochs=not config.sched_on_updates,
            updates_per_epoch=len(train_loader),
        )
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}[config.amp_dtype]
        self.autocast = torch.autocast(device.type, half, enabled=config.amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp and half is torch.float16)

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self._groups)

    @property
    def done(self) -> bool:
        return self.position.epoch >= self.epochs

    def fit(self, progress: Progress) -> Position:
        """Train to the last epoch from wherever the run stands.

        Raises: Interrupted after a signal, when everything is saved; NonFiniteError; CheckpointError.
        """
        position = self.position
        summary = self.run_dir / "summary.csv"
        trim_summary(str(summary), position.epoch)
        self._schedule()
        self._saved_at = time.perf_counter()
        with StopSignals() as stop:
            while not self.done:
                label = f"epoch {position.epoch + 1}/{self.epochs}"
                with progress.bar(label, len(self.train_loader), position.batch) as bar:
                    self._train_epoch(stop, bar)
                    measured = self._evaluate(stop)
                train_loss = position.loss_sum / max(1, len(self.train_loader))
                self._finish_epoch(measured, train_loss, summary)
                _log.info(
                    "%s: loss %.4f, held-out loss %.4f, held-out accuracy %.2f %% (best %.2f %%), %.0f s",
                    label, train_loss, measured["loss"], measured["top1"], position.best_metric, position.seconds,
                )  # fmt: skip
        return position

    def _schedule(self) -> None:
        """Set the learning rate that belongs to the position."""
        if self.scheduler is not None:
            self.scheduler.step(self.position.epoch)
            self.scheduler.step_update(self.position.epoch * len(self.train_loader) + self.position.batch)

    def _train_epoch(self, stop: StopSignals, bar: Any) -> None:
        """The batches of the epoch in progress that are still to be done."""
        position, config = self.position, self.config
        self.train_loader.batch_sampler.at(position.epoch, position.batch)
        self.model.train()
        for images, targets in stop.until_asked(self.train_loader):
            images, targets = images.to(self.device), targets.to(self.device)
            loss = self._step(images, targets)
            position.batch += 1
            position.loss_sum += loss
            self._schedule()
            bar.advance(len(images), loss=position.loss_sum / position.batch, lr=self.lr)
            if config.recovery_interval and position.batch % config.recovery_interval == 0:
                self.save()
        self._stop_if_asked(stop)

    def _step(self, images: Tensor, targets: Tensor) -> float:
        """One update of the weights; none if loss or gradient is not finite."""
        before = checkpoint.random_state()
        if self.mixup is not None:
            images, targets = self.mixup(images, targets)
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.task(images, targets)["loss"]
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.config.clip_grad if self.config.clip_grad and self.config.clip_mode == "norm" else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if self.config.clip_grad and self.config.clip_mode != "norm":
            dispatch_clip_grad(parameters, self.config.clip_grad, mode=self.config.clip_mode)
        value, size = torch.stack([loss.detach().float(), norm.float()]).tolist()
        # A loss scaler skips steps whose scaled gradient overflows and lowers its scale; that is its ordinary work.
        overflows = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        if not math.isfinite(value) or not (math.isfinite(size) or overflows):
            self._refuse(value, size, before)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.task.update_ema(self.position.epoch * len(self.train_loader) + self.position.batch + 1)
        return value

    def _refuse(self, loss: float, norm: float, before: dict[str, Any]) -> None:
        """Stop at a loss or gradient that is not finite, with the state from before the step saved apart."""
        self.optimizer.zero_grad()
        path = self.run_dir / BEFORE_NON_FINITE
        kept = "the weights were already damaged, so they are not saved"
        if all(bool(torch.isfinite(p).all()) for p in self.model.parameters()):
            checkpoint.save({**self.state(), "random_state": before}, [path])
            kept = f"the state before that step is in {path}"
        raise NonFiniteError(
            f"step {self.position.batch + 1} of epoch {self.position.epoch + 1}: the loss is {loss}, the norm of its "
            f"gradient {norm}, at learning rate {self.lr:.3e}; {kept}. Lower --lr, limit the gradient with "
            f"--clip-grad 1, or try --no-amp; then --resume {path} or begin again."
        )

    @torch.no_grad()
    def _evaluate(self, stop: StopSignals) -> dict[str, float]:
        """Loss and accuracies on the held-out images."""
        model = self.task.get_eval_model(ema=self.config.model_ema)
        assert model is not None
        evaluator = self.task.create_evaluator()
        model.eval()
        for images, targets in stop.until_asked(self.eval_loader):
            with self.autocast:
                output = model(images.to(self.device))
            evaluator.update(output, targets.to(self.device))
        self._stop_if_asked(stop)
        return dict(evaluator.compute())

    def _finish_epoch(self, measured: dict[str, float], train_loss: float, summary: Path) -> None:
        """Write down an epoch that is trained and evaluated, and begin the next."""
        position = self.position
        best = position.best_metric is None or measured["top1"] > position.best_metric
        update_summary(position.epoch, {"loss": train_loss}, measured, str(summary), lr=self.lr)
        position.metric = measured["top1"]
        position.epoch, position.batch, position.loss_sum = position.epoch + 1, 0, 0.0
        if best:
            position.best_metric, position.best_epoch = measured["top1"], position.epoch
        self._schedule()
        self.save(*([BEST] if best else []))

    def _stop_if_asked(self, stop: StopSignals) -> None:
        if stop.signum is not None:
            self.save()
            raise Interrupted(stop.signum, str(self.run_dir / LAST))

    def save(self, *also: str) -> None:
        """Write the last checkpoint, and the same under other names."""
        now = time.perf_counter()
        self.position.seconds, self._saved_at = self.position.seconds + now - self._saved_at, now
        checkpoint.save(self.state(), [self.run_dir / name for name in (LAST, *also)])

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        return {
            "arch": self.config.model,
            **asdict(self.position),
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.config.model_ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
            "random_state": checkpoint.random_state(),
            "args": self.config.plain(),
            **self.extras,
        }

    def restore(self, content: dict[str, Any], path: str | Path) -> None:
        """Continue where a checkpoint left off.

        Raises: CheckpointError if it is not one of this run's model.
        """

        def entry(key: str) -> Any:
            return checkpoint.entry(content, key, path)

        arch = self.config.model
        checkpoint.load(self.model, checkpoint.weights(content, path, use_ema=False), path, arch, entry("arch"))
        if self.config.model_ema:  # an average that begins only now begins at the weights
            self.task.load_checkpoint_state(content.get("state_dict_ema") or entry("state_dict"), ema=True)
        self.position = Position(**{key: entry(key) for key in asdict(self.position)})
        chosen = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        try:
            self.optimizer.load_state_dict(entry("optimizer"))
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path} holds the state of another optimizer: {error}; keep --opt and --layer-decay "
                "as they were, and --weight-decay 0 or not, or begin from its weights with --initial-checkpoint."
            ) from error
        for group, options in zip(self._groups, chosen, strict=True):
            group.update(options)  # what the options say now, not what they said when it was saved
        if entry("amp_scaler"):
            self.scaler.load_state_dict(content["amp_scaler"])
        checkpoint.set_random_state(entry("random_state"))
