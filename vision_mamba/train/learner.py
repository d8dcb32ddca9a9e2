"""A model with all that makes it learn: loss, optimizer, schedule, average of weights, precision, processes.

One update is `gradients` of a group of batches, then `apply` or `discard`: between the two a run looks at the figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vision_mamba.train import checkpoint, parallel
from vision_mamba.train.errors import CheckpointError, ConfigError
from vision_mamba.train.objective import mixing, task_of
from vision_mamba.train.options import Config
from vision_mamba.train.parallel import World
from vision_mamba.train.seeds import seed_step

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """A model that learns as the options say.

    Args:
        model: on its device. teacher: a model, the name of one with published weights, or None.
        batches: of an epoch, in this process.
        data_config: of the images, for a teacher that was trained on others.

    Raises: ConfigError if options contradict each other.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        world: World,
        batches: int,
        data_config: dict[str, Any],
        teacher: nn.Module | str | None = None,
    ) -> None:
        self.config, self.world, self.model = config, world, model
        self.updates = -(-batches // config.grad_accum_steps)  # of an epoch
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        self.task = task_of(config, model, world.device, data_config, teacher)
        trainable = self.task.get_trainable_module()
        assert trainable is not None
        if config.model_ema:
            warm = config.model_ema_warmup
            self.task.setup_ema(decay=config.model_ema_decay, use_warmup=warm)
        if config.fsdp:
            _refuse_with_fsdp(config, world)
            for module in (trainable, unwrap_model(self.task.get_trainable_module(ema=True))):
                if module is not None:
                    parallel.shard(module, world)
        self.optimizer = _optimizer(config, trainable, world.size)
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(config), updates_per_epoch=self.updates
        )
        if config.torchcompile is not None:
            try:
                self.task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
            except RuntimeError as error:  # of a backend or mode that does not exist
                raise ConfigError(f"--torchcompile {config.torchcompile}, --torchcompile-mode: {error}") from error
        self.eval_model = self.task.get_eval_model(ema=config.model_ema)
        if world.size > 1 and not config.fsdp:
            self.task.prepare_distributed(device_ids=None if world.device.type == "cpu" else [world.device])
        self.autocast = torch.autocast(world.device.type, HALVES[config.amp_dtype], enabled=config.amp)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp and config.amp_dtype == "float16")
        self.erase = RandomErasing(
            config.reprob, mode=config.remode, max_count=config.recount, device=str(world.device)
        )
        self.mixup = mixing(config, model.num_classes)  # type: ignore[arg-type]
        # What every step walks through is listed once: modules are slow to search, and the GPU would wait meanwhile.
        self._listed = list(model.buffers())
        self._buffers: list[tuple[Tensor, Tensor]] = []  # of the model, and what they held before the step
        self._averaged: list[tuple[Tensor, Tensor]] = []  # each tensor of the average, and the model's

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self._groups)

    def schedule(self, epoch: int, batch: int) -> None:
        """Set the learning rate that belongs to a position."""
        if self.scheduler is not None:
            self.scheduler.step(epoch)
            self.scheduler.step_update(self.done(epoch, batch))

    def done(self, epoch: int, batch: int) -> int:
        """Updates until a position."""
        return epoch * self.updates + -(-batch // self.config.grad_accum_steps)

    def gradients(self, group: Sequence[tuple[Tensor, Tensor]], epoch: int, batch: int) -> Tensor:
        """Compute the gradients of a group of batches, limited as the options say.

        Args:
            epoch, batch: the position of the first of them, of which all random numbers are a function.

        Returns: the loss in this process, and the norm of the gradient over all processes before it was limited, on
            the device, which may still compute.
        """
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.config.mixup_off_epoch or epoch < self.config.mixup_off_epoch
        self.optimizer.zero_grad()
        self._buffers = [(own, own.detach().clone()) for own in self._listed]
        losses = []
        for number, (images, targets) in enumerate(group):
            seed_step(self.config.seed, self.world.rank, epoch, batch + number)
            if self.config.reprob:
                images = self.erase(images)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            alone = number + 1 < len(group)
            module = self.task.get_trainable_module()
            assert module is not None
            with parallel.local_gradients(module) if alone else nullcontext():
                with self.autocast:
                    loss = self.task(images, targets)["loss"]
                self.scaler.scale(loss / len(group)).backward()
            losses.append(loss.detach().float())
        self.scaler.unscale_(self.optimizer)
        return torch.stack([torch.stack(losses).mean(), self._limited()])

    def _limited(self) -> Tensor:
        """Limit the gradients; returns their norm before."""
        config = self.config
        parameters = [p for p in self.task.parameters() if p.grad is not None]
        limit = config.clip_grad if config.clip_grad and config.clip_mode == "norm" else math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if config.clip_grad and config.clip_mode != "norm":
            kept = self.task.get_clip_parameters(exclude_head=config.clip_mode == "agc")
            parameters = [p for p in kept if p.grad is not None]
            dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).float()

    @property
    def overflows(self) -> bool:
        """Whether the loss scaler sees to gradients that are not finite: it skips the step and lowers its scale."""
        return self.scaler.is_enabled() and self.scaler.get_scale() >= 1

    def apply(self, epoch: int, batch: int) -> None:
        """Change the weights by the gradients; the position is that after the step."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.config.model_ema:
            self._average(self.done(epoch, batch))

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the average towards the weights as timm's ModelEmaV3 does, in each process its own share."""
        average: Any = self.task.get_trainable_module(ema=True)
        if not self._averaged:
            pair = (average.module, unwrap_model(self.task.get_trainable_module()))
            self._averaged = list(zip(*(module.state_dict(keep_vars=True).values() for module in pair), strict=True))
        own = [(parallel.share(to), parallel.share(value)) for to, value in self._averaged]
        averages = [to for to, _ in own if to.is_floating_point()]
        values = [value for to, value in own if to.is_floating_point()]
        torch._foreach_lerp_(averages, values, weight=1 - average.get_decay(step))
        for to, value in own:
            if not to.is_floating_point():
                to.copy_(value)

    def discard(self) -> None:
        """Leave the weights as they are, and the statistics of batch norms as they were before the forward pass."""
        with torch.no_grad():
            for own, before in self._buffers:
                own.copy_(before)
        self.optimizer.zero_grad()
        self.scaler.update()

    def sound(self) -> bool:
        """Whether weights and buffers in this process are finite."""
        state = self.model.state_dict().values()
        own = map(parallel.share, state)
        return all(bool(torch.isfinite(value).all()) for value in own if value.is_floating_point())

    def state(self) -> dict[str, Any]:
        """All that must be saved to go on; every process must ask for it."""
        state = {
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if self.config.model_ema else {}),
            "optimizer": self.optimizer.state_dict(),
            "amp_scaler": self.scaler.state_dict(),
        }
        return parallel.whole(state) if self.config.fsdp else state

    def restore(self, content: dict[str, Any], path: Any) -> None:
        """Continue from a state.

        Raises: CheckpointError if it is not one of such a learner.
        """

        def entry(key: str) -> Any:
            return checkpoint.entry(content, key, path)

        arch = self.config.model
        state_dict = checkpoint.weights(content, path, use_ema=False)
        checkpoint.check(self.model, state_dict, path, arch, entry("arch"))
        parallel.load_model(self.model, state_dict)
        self.task.load_task_state(content.get("task_state"))
        if self.config.model_ema:  # an average that begins only now begins at the weights
            average = self.task.get_eval_model(self.task.get_trainable_module(ema=True), ema=True)
            assert average is not None
            parallel.load_model(average, content.get("state_dict_ema") or state_dict)
            self.task.load_task_state(content.get("task_state_ema"), ema=True)
        if (opt := entry("args")["opt"]) != self.config.opt:
            raise CheckpointError(
                f"checkpoint {path} holds the state of another optimizer, {opt}; keep --opt {opt}, or begin from its "
                "weights with --initial-checkpoint."
            )
        chosen = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        try:
            parallel.load_optimizer(self.optimizer, entry("optimizer"))
        except ValueError as error:
            raise CheckpointError(
                f"checkpoint {path} holds the state of another optimizer: {error}; keep --opt and --layer-decay "
                "as they were, and --weight-decay 0 or not, or begin from its weights with --initial-checkpoint."
            ) from error
        for group, options in zip(self._groups, chosen, strict=True):
            group.update(options)  # what the options say now, not what they said when it was saved
        if entry("amp_scaler"):
            self.scaler.load_state_dict(content["amp_scaler"])


def _optimizer(config: Config, trainable: nn.Module, processes: int) -> torch.optim.Optimizer:
    options = optimizer_kwargs(config) | {"lr": learning_rate(config, processes)} | (config.opt_kwargs or {})
    try:
        return create_optimizer_v2(trainable, **options)
    except TypeError as error:
        raise ConfigError(f"--opt-kwargs: {config.opt} does not take them: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"--opt {config.opt}, --opt-betas, --opt-eps, --opt-kwargs: {error}.") from error


def learning_rate(config: Config, processes: int) -> float:
    """The learning rate after the warm-up: as given, or by the number of images a step."""
    if config.lr is not None:
        return config.lr
    ratio = config.batch_size * processes * config.grad_accum_steps / config.lr_base_size
    adaptive = any(part in config.opt.lower() for part in ("ada", "lamb"))  # the rule of timm's train.py
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return config.lr_base * (ratio**0.5 if scale == "sqrt" else ratio)


def _refuse_with_fsdp(config: Config, world: World) -> None:
    """Raises: ConfigError for what cannot be shared out."""
    faults = {
        "there is one process; start several with torchrun": world.size == 1,
        "--amp-dtype float16 scales the loss; take bfloat16": config.amp and config.amp_dtype == "float16",
        "--clip-mode agc looks at whole weights; take norm": bool(config.clip_grad) and config.clip_mode == "agc",
        "--kd-distill-type feature calls parts of the model by themselves; take logit": (
            config.kd_model_name is not None and config.kd_distill_type == "feature"
        ),
    }
    if found := [fault for fault, holds in faults.items() if holds]:
        raise ConfigError(f"--fsdp: {'; '.join(found)}.")
