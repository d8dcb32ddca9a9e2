"""The options of a training run, each with its default, its check and its help.

Names and meanings are those of timm's train.py wherever it has the option, so that a config drives both. Options that
are ours alone: dataset "digits", check_images, skip_unreadable, overwrite.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers

DATASETS = ("folder", "digits")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")


def _option(
    section: str,
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    length: int | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    also: tuple[str, ...] = (),
) -> Any:
    """A field with what its check, its flag and its help need; `also` are other names that people try."""
    metadata = {"section": section, "help": help, "low": low, "high": high, "length": length, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata | {"also": also})


def _optimizers() -> list[str]:
    return [str(name) for name in list_optimizers()]


_data = functools.partial(_option, "data")
_model = functools.partial(_option, "model")
_optim = functools.partial(_option, "optimizer")
_sched = functools.partial(_option, "schedule")
_augment = functools.partial(_option, "augmentation and regularisation")
_run = functools.partial(_option, "run")


@dataclass(frozen=True)
class Config:
    """Every option of a training run, with the defaults of timm's train.py or milder ones."""

    dataset: str = _data("folder", "folder (class folders under DIR/train and DIR/val) or digits (of scikit-learn)",
                         choices=lambda: DATASETS)  # fmt: skip
    data_dir: str | None = _data(None, "where train/ and val/ are; not used by digits", also=("data", "data_path"))
    train_split: str = _data("train", "folder of the images to train on, under data_dir")
    val_split: str = _data("validation", "held-out folder under data_dir; val, valid, eval are found as well")
    workers: int = _data(2, "processes that load images; 0 loads in the training process", 0, also=("num_workers",))
    check_images: bool = _data(True, "decode every image once before training, so that a bad one stops no long run")
    skip_unreadable: bool = _data(False, "leave unreadable images out and list them in the log, instead of stopping")
    mean: tuple[float, ...] | None = _data(None, "pixel mean per channel, of 0..1 (the model's own if not given)")
    std: tuple[float, ...] | None = _data(None, "pixel deviation per channel (the model's own if not given)")
    interpolation: str | None = _data(None, "how images are resized: bicubic, bilinear (the model's own)")
    crop_pct: float | None = _data(None, "share of a held-out image's side that is kept (the model's own)", 0.1, 1)

    model: str = _model("vmamba_tiny_s1l8", "a registered name, of this package or of timm", also=("arch",))
    model_kwargs: dict[str, Any] | None = _model(None, "arguments of the model's constructor, as in drop_path_rate=0.1")  # noqa: RUF009  a dict is no default here
    num_classes: int | None = _model(None, "outputs of the classifier (as many as the data set has classes)", 1)
    in_chans: int | None = _model(None, "channels of the images: 1 grey, 3 colour (the model's own)", 1, 3)
    img_size: int | None = _model(None, "side of the square that images are resized to (the model's own)", 1)
    pretrained: bool = _model(False, "begin from the model's published weights")
    initial_checkpoint: str | None = _model(None, "begin from the weights in this file", also=("finetune",))
    drop: float | None = _model(None, "dropout rate", 0, 1, also=("dropout", "drop_rate"))
    drop_path: float | None = _model(None, "stochastic depth rate", 0, 1, also=("drop_path_rate",))

    opt: str = _optim("adamw", "any optimizer of timm", choices=_optimizers, also=("optimizer",))
    lr: float = _optim(5e-4, "learning rate after the warm-up", 0, also=("learning_rate",))
    weight_decay: float = _optim(0.05, "not applied to biases, norms and what the model exempts", 0, also=("wd",))
    momentum: float = _optim(0.9, "of optimizers that have one", 0, 1)
    opt_eps: float | None = _optim(None, "epsilon (the optimizer's own)", 0)
    opt_betas: tuple[float, ...] | None = _optim(None, "betas (the optimizer's own)", length=2)
    opt_kwargs: dict[str, Any] | None = _optim(None, "further arguments of the optimizer, as in fused=true")  # noqa: RUF009
    layer_decay: float | None = _optim(None, "factor of the learning rate from each layer to the one below", 0, 1)
    clip_grad: float | None = _optim(None, "limit of the gradient (none)", 0, also=("max_grad_norm",))
    clip_mode: str = _optim("norm", "what clip_grad limits", choices=lambda: ("norm", "value", "agc"))

    epochs: int = _sched(300, "passes over the training images", 1, also=("num_epochs",))
    batch_size: int = _sched(128, "images a step", 1)
    validation_batch_size: int | None = _sched(None, "images a step of evaluation (batch_size)", 1)
    sched: str = _sched("cosine", "how the learning rate falls", choices=lambda: SCHEDULES,
                        also=("scheduler", "lr_scheduler"))  # fmt: skip
    sched_on_updates: bool = _sched(False, "adapt the learning rate after every step, not only after every epoch")
    warmup_epochs: float = _sched(5, "epochs in which the learning rate rises", 0)
    warmup_lr: float = _sched(1e-6, "learning rate at the very start", 0)
    min_lr: float = _sched(0.0, "learning rate at the very end", 0)
    decay_epochs: float | None = _sched(
        None, "step: epochs between falls [90]; wsd, rsqrt: length of the fall [0.2]", 0
    )
    decay_milestones: tuple[float, ...] = _sched((90, 180, 270), "multistep: epochs at which the learning rate falls")
    decay_rate: float = _sched(0.1, "step, multistep: factor of a fall", 0)

    no_aug: bool = _augment(False, "train on the images as they are")
    scale: tuple[float, ...] = _augment(
        (0.08, 1.0), "share of the area that a random crop keeps, least and most", length=2
    )
    ratio: tuple[float, ...] = _augment((3 / 4, 4 / 3), "aspect ratio of a random crop, least and most", length=2)
    hflip: float = _augment(0.5, "probability of mirroring left to right", 0, 1)
    vflip: float = _augment(0.0, "probability of mirroring top to bottom", 0, 1)
    color_jitter: float = _augment(0.4, "strength of changes in brightness, contrast and saturation; off with aa", 0)
    aa: str | None = _augment(None, "AutoAugment policy such as rand-m9-mstd0.5-inc1", also=("auto_augment",))
    reprob: float = _augment(0.0, "probability of erasing a random rectangle", 0, 1, also=("re_prob",))
    remode: str = _augment("pixel", "what an erased rectangle holds", choices=lambda: ("pixel", "rand", "const"))
    train_interpolation: str = _augment("random", "how training images are resized: random, bilinear, bicubic")
    mixup: float = _augment(0.0, "alpha of mixup; 0 is off", 0)
    cutmix: float = _augment(0.0, "alpha of cutmix; 0 is off", 0)
    mixup_prob: float = _augment(1.0, "probability of mixing a batch, where mixup or cutmix is on", 0, 1)
    mixup_switch_prob: float = _augment(0.5, "probability of cutmix rather than mixup, where both are on", 0, 1)
    smoothing: float = _augment(0.1, "label smoothing", 0, 1, also=("label_smoothing",))
    model_ema: bool = _augment(False, "also keep, evaluate and save a moving average of the weights", also=("ema",))
    model_ema_decay: float = _augment(0.9998, "how much of the average stays at each step", 0, 1)
    model_ema_warmup: bool = _augment(False, "let the decay grow to its value")

    device: str | None = _run(None, "cpu, cuda, cuda:1, mps (the accelerator if there is one)")
    amp: bool = _run(False, "mixed precision: multiplications in amp_dtype, weights and scan states in float32")
    amp_dtype: str = _run("bfloat16", "bfloat16 needs no loss scaling; float16 gets it",
                          choices=lambda: ("bfloat16", "float16"))  # fmt: skip
    seed: int = _run(42, "of weights, order, augmentation and dropout; on a CPU it settles the run bit for bit", 0)
    output: str = _run("output", "folder of all runs", also=("output_dir", "out"))
    experiment: str | None = _run(None, "folder of this run under output (the model's name)", also=("name",))
    overwrite: bool = _run(False, "replace a run that lies in that folder")
    resume: str | None = _run(None, "continue from this checkpoint, or 'auto': from the run's last one if it has any")
    recovery_interval: int = _run(0, "also save every so many steps; 0 saves after each epoch only", 0)
    log_interval: int = _run(50, "steps between two lines of the log where there is no terminal to draw a bar on", 1)

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / (self.experiment or self.model.replace("/", "_").replace(":", "_"))

    def plain(self) -> dict[str, Any]:
        """The options as YAML and checkpoints hold them. How the run began is left out."""
        options = dataclasses.asdict(self) | {"resume": None, "overwrite": False}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(Config)}
