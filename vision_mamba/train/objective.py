"""What a model is asked to do: the loss, mixed and smoothed labels, and a teacher to follow."""

from __future__ import annotations

from typing import Any

import torch
from timm.data import Mixup
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)
from torch import nn

from vision_mamba.train.errors import ConfigError
from vision_mamba.train.options import Config

_DISTILLATIONS = {
    "logit": (LogitDistillationTask, {"temperature": "kd_temperature"}),
    "feature": (FeatureDistillationTask, {}),
    "token": (TokenDistillationTask, {"temperature": "kd_temperature", "distill_type": "kd_token_distill_type"}),
}


def task_of(
    config: Config, model: nn.Module, device: torch.device, data_config: dict[str, Any], teacher: nn.Module | str | None
) -> TrainingTask:
    """The loss of a model, on labels alone or on a teacher's word too.

    Raises: ConfigError if the teacher cannot be had, or the model cannot learn from one in that way.
    """
    loss: dict[str, Any] = {"loss_type": "bce" if config.bce_loss else "ce"}
    loss |= {"soft_targets": True} if config.mixes else {"smoothing": config.smoothing}
    if config.bce_loss:
        loss |= {"bce_target_thresh": config.bce_target_thresh, "bce_sum": config.bce_sum}
    common: dict[str, Any] = {"criterion_kwargs": loss, "device": device, "verbose": False}
    if teacher is None:
        return ClassificationTask(model, **common)
    own: Any = model  # a model of timm's has more than a Module is known to have
    own.pretrained_cfg = own.pretrained_cfg | {key: tuple(data_config[key]) for key in ("mean", "std")}
    kind, options = _DISTILLATIONS[config.kd_distill_type]
    weights = {"distill_loss_weight": config.distill_loss_weight, "task_loss_weight": config.task_loss_weight}
    chosen = {name: getattr(config, option) for name, option in options.items()}
    try:
        task = kind(model, teacher, **common, **weights, **chosen)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"--kd-model-name {config.kd_model_name}: {error}") from error
    task.teacher.requires_grad_(False)
    return task


def mixing(config: Config, num_classes: int) -> Mixup | None:
    """How images of a batch are mixed, with their labels."""
    if not config.mixes:
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )
