"""The options of a detection run, each with its default, its check and its help."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_mamba.detection.model import DETECTORS
from vision_mamba.train.config import Reader
from vision_mamba.train.fields import Options, one_of, option
from vision_mamba.train.options import optimizers

_data = functools.partial(option, "data")
_model = functools.partial(option, "model")
_optim = functools.partial(option, "optimizer")
_sched = functools.partial(option, "schedule")
_augment = functools.partial(option, "sizes and augmentation")
_run = functools.partial(option, "run")


@dataclass(frozen=True)
class Config(Options):
    """Every option of a detection run; names are those of tools/train.py where that has the option too."""

    data_dir: str | None = _data(None, "where annotations/instances_<split>.json and the folders <split>/ are")
    train_split: str = _data("train2017", "name of the split to train on")
    val_split: str = _data("val2017", "name of the split held out")
    workers: int = _data(2, "processes that load images, for each device; 0 loads in the training process", 0)
    skip_bad: bool = _data(False, "leave bad images and annotations out and list them in the log, instead of stopping")
    keep_empty: bool = _data(False, "also train on images on which there is no object")

    model: str = _model("vmamba_tiny_s1l8", "backbone: a registered name, of this package or of timm")
    model_kwargs: dict[str, Any] | None = _model(None, "arguments of its constructor, as in norm_eps=1e-6")  # noqa: RUF009
    pretrained: bool = _model(False, "begin from the backbone's published weights")
    initial_checkpoint: str | None = _model(None, "begin from the backbone's weights in this file, of a classifier")
    drop_path: float | None = _model(None, "stochastic depth rate", 0, 1)
    detector: str = _model("mask_rcnn", "head", choices=one_of(*DETECTORS))
    detector_kwargs: dict[str, Any] | None = _model(None, "further arguments of torchvision's detector")  # noqa: RUF009
    strides: tuple[int, ...] | None = _model(None, "reductions of the maps to detect on (the detector's own)", 1)
    fpn_channels: int = _model(256, "channels of the feature pyramid", 1)
    head_channels: int = _model(1024, "hidden width of the box head of Faster and Mask R-CNN", 1)
    anchor_scale: float | None = _model(
        None, "side of a level's smallest anchor over its stride (the detector's own)", 0
    )
    tap_norm: bool = _model(True, "a layer norm on every map that is taken from the backbone, as published")

    opt: str = _optim("adamw", "any optimizer of timm", choices=optimizers)
    lr: float = _optim(1e-4, "learning rate after the warm-up, for all devices together", 0)
    weight_decay: float = _optim(0.05, "not applied to biases, norms and what the backbone exempts", 0)
    clip_grad: float | None = _optim(None, "limit of the gradient's norm (none)", 0)

    epochs: int = _sched(12, "passes over the training images", 1)
    batch_size: int = _sched(2, "images a step, for each device", 1)
    sched: str = _sched("multistep", "how the learning rate falls", choices=one_of("multistep", "cosine"))
    decay_milestones: tuple[float, ...] = _sched((8, 11), "multistep: epochs at which the learning rate falls", 0)
    decay_rate: float = _sched(0.1, "multistep: factor of a fall", 0)
    warmup_steps: int = _sched(1000, "steps in which the learning rate rises", 0)
    warmup_factor: float = _sched(1e-3, "learning rate at the very start, over lr", 0)

    min_size: tuple[int, ...] = _augment((800,), "shorter side of an image; in training one of these by chance", 1)
    max_size: int = _augment(1333, "limit of the longer side", 1)
    hflip: float = _augment(0.5, "probability of mirroring left to right", 0, 1)
    photometric: bool = _augment(False, "change brightness, contrast, saturation, hue and channels by chance")
    crop_size: tuple[int, ...] | None = _augment(None, "least and greatest side of a random crop of every other image, "
                                                 "before it is resized (none)", 1, length=2)  # fmt: skip
    crop_min_size: tuple[int, ...] = _augment((400, 500, 600), "shorter side of an image before that crop", 1)

    device: str | None = _run(None, "cpu, cuda, mps (the accelerator if there is one)")
    amp: bool = _run(False, "mixed precision: multiplications in bfloat16, weights and scan states in float32")
    seed: int = _run(42, "of weights, order and augmentation", 0)
    output: str = _run("output", "folder of all runs")
    experiment: str | None = _run(None, "folder of this run under output (model and detector)")
    overwrite: bool = _run(False, "replace a run that lies in that folder", kept=False)
    resume: str | None = _run(
        None, "continue from this checkpoint, or 'auto': from the run's last one if it has any", kept=False
    )
    recovery_interval: int = _run(0, "also save every so many steps; 0 saves after each epoch only", 0)
    log_interval: int = _run(50, "steps between two lines of the log where no terminal shows a bar", 1)
    eval_interval: int = _run(1, "epochs between two evaluations; the last is always evaluated", 1)
    samples: int = _run(8, "held-out images in the picture of truth and detections, samples.png", 0)
    record: str | None = _run(None, "append the result, with where it comes from, to this .jsonl file")

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / (self.experiment or f"{self.model}_{self.detector}".replace("/", "_"))


READER = Reader(
    Config,
    "tools/train_detection.py",
    "Train a detector on a backbone of this package or of timm, on data in the format of COCO.",
    """\
examples:
  tools/make_digits_coco.py --out output/digits_coco
  tools/train_detection.py --config configs/digits/mask_rcnn.yaml --data-dir output/digits_coco
  torchrun --nproc-per-node 8 tools/train_detection.py --config configs/coco/vmamba_tiny_maskrcnn_1x.yaml \\
      --data-dir coco --initial-checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth
  tools/train_detection.py --resume output/digits_mask_rcnn/last.pth       continue an interrupted run

A flag wins over the config file; 'none' unsets an option. A run writes output/<experiment>/: last.pth and best.pth,
args.yaml, summary.csv (one row an evaluation), samples.png, train.log. Ctrl-C saves first.
exit status: 0 done, 1 failed, 2 wrong options, 130 Ctrl-C, 143 SIGTERM.""",
)
