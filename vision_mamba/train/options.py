"""The options of a training run, each with its default, its check and its help.

Names and meanings are those of timm's train.py wherever it has the option, so that a config drives both. `OURS_ALONE`
lists the others, which timm's train.py passes over in a config.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.optim import list_optimizers

from vision_mamba.train.config import Reader
from vision_mamba.train.fields import Options, one_of, option

DATASETS = ("folder", "digits")
ARCHIVES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")  # what timm.data reads by name
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")
RESIZES = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
#: Options that mean nothing without another.
NEEDED = {"kd_checkpoint": "kd_model_name", "train_batch_sizes": "train_img_sizes", "torchcompile_mode": "torchcompile"}
OURS_ALONE = frozenset(
    {"check_images", "skip_bad_images", "kd_checkpoint", "fsdp", "deterministic", "overwrite"}
    | {"max_bad_steps", "log_tensorboard", "dry_run"}
)


def optimizers() -> list[str]:
    return [str(name) for name in list_optimizers()]


_data = functools.partial(option, "data")
_model = functools.partial(option, "model")
_teacher = functools.partial(option, "teacher")
_optim = functools.partial(option, "optimizer")
_sched = functools.partial(option, "schedule")
_sizes = functools.partial(option, "image sizes that change from batch to batch")
_augment = functools.partial(option, "augmentation and regularisation")
_run = functools.partial(option, "run")


@dataclass(frozen=True)
class Config(Options):
    """Every option of a training run, with the defaults of timm's train.py or milder ones."""

    dataset: str = _data("folder", "folder (class folders or tar files DIR/train, DIR/val), digits (of scikit-learn), "
                         "or what timm.data reads: torch/NAME, hfds/NAME, hfids/NAME, tfds/NAME, wds/NAME",
                         choices=lambda: DATASETS, prefixes=ARCHIVES)  # fmt: skip
    data_dir: str | None = _data(None, "where train/ and val/ are; not used by digits", also=("data", "data_path"))
    train_split: str = _data("train", "folder of the images to train on, under data_dir")
    val_split: str = _data("validation", "held-out folder under data_dir; val, valid, eval are found as well")
    train_num_samples: int | None = _data(None, "images to train on of a stream that does not say how many it has", 1)
    val_num_samples: int | None = _data(None, "held-out images of a stream that does not say how many it has", 1)
    dataset_download: bool = _data(False, "let torch/ and tfds/ data sets be downloaded")
    class_map: str | None = _data(None, "text file of class names in the order of their indices")
    input_key: str | None = _data(None, "name of the images in hfds/, hfids/, tfds/, wds/ (the reader's own)")
    target_key: str | None = _data(None, "name of the classes there (the reader's own)")
    workers: int = _data(2, "processes that load images; 0 loads in the training process", 0, also=("num_workers",))
    check_images: bool = _data(True, "decode every image once before training, so that a bad one stops no long run")
    skip_bad_images: int = _data(0, "leave out up to so many unreadable images, each named in the log", 0,
                                 also=("skip_unreadable",))  # fmt: skip
    mean: tuple[float, ...] | None = _data(None, "pixel mean per channel, of 0..1 (the model's own if not given)")
    std: tuple[float, ...] | None = _data(None, "pixel deviation per channel (the model's own if not given)", 1e-6)
    interpolation: str | None = _data(None, "how images are resized (the model's own)", choices=one_of(*RESIZES))
    crop_pct: float | None = _data(None, "share of a held-out image's side that is kept (the model's own)", 0.1, 1)

    model: str = _model("vmamba_tiny_s1l8", "a registered name, of this package or of timm", also=("arch",))
    device_modules: tuple[str, ...] = _model((), "Python modules to import first, which may register further models")
    model_kwargs: dict[str, Any] | None = _model(None, "arguments of the model's constructor, as in drop_path_rate=0.1")  # noqa: RUF009  a dict is no default here
    num_classes: int | None = _model(None, "outputs of the classifier (as many as the data set has classes)", 1)
    in_chans: int | None = _model(None, "channels of the images: 1 grey, 3 colour (the model's own)", 1, 3)
    img_size: int | None = _model(None, "side of the square that images are resized to (the model's own)", 1)
    gp: str | None = _model(None, "how features are pooled: avg, max, avgmax, token ... (the model's own)")
    pretrained: bool = _model(False, "begin from the model's published weights")
    initial_checkpoint: str | None = _model(None, "begin from the weights in this file", also=("finetune",))
    drop: float | None = _model(None, "dropout rate", 0, 1, also=("dropout", "drop_rate"))
    drop_path: float | None = _model(None, "stochastic depth rate", 0, 1, also=("drop_path_rate",))
    grad_checkpointing: bool = _model(False, "compute activations again in the backward pass, to save memory")
    torchcompile: str | None = _model(None, "compile the model with this backend [inductor]", bare="inductor",
                                      also=("compile", "torch_compile"))  # fmt: skip
    torchcompile_mode: str | None = _model(None, "mode of torch.compile, such as max-autotune")

    kd_model_name: str | None = _teacher(None, "teacher: any model of timm, with its published weights",
                                         also=("teacher", "teacher_model"))  # fmt: skip
    kd_checkpoint: str | None = _teacher(None, "file of the teacher's weights, instead of the published")
    kd_distill_type: str = _teacher("logit", "what is taught: outputs, pooled features, or a distillation token",
                                    choices=one_of("logit", "feature", "token"))  # fmt: skip
    distill_loss_weight: float | None = _teacher(None, "weight of the teacher's loss [1]", 0)
    task_loss_weight: float | None = _teacher(None, "weight of the labels' loss [1]; alone, the teacher's is 1 - it", 0)
    kd_temperature: float = _teacher(4.0, "by which outputs are divided before they are compared", 1e-3)
    kd_token_distill_type: str = _teacher("soft", "the token's targets: the teacher's probabilities or its choice",
                                          choices=one_of("soft", "hard"))  # fmt: skip

    opt: str = _optim("adamw", "any optimizer of timm", choices=optimizers, also=("optimizer",))
    lr: float | None = _optim(None, "learning rate after the warm-up (by lr_base)", 0, also=("learning_rate",))
    lr_base: float = _optim(5e-4, "learning rate at lr_base_size images a step, where lr is not given", 0)
    lr_base_size: int = _optim(256, "images a step, over all processes, that lr_base is meant for", 1)
    lr_base_scale: str | None = _optim(None, "how it grows with them (sqrt for Adam's kin and LAMB, else linear)",
                                       choices=one_of("linear", "sqrt"))  # fmt: skip
    weight_decay: float = _optim(0.05, "not applied to biases, norms and what the model exempts", 0, also=("wd",))
    momentum: float = _optim(0.9, "of optimizers that have one", 0, 1)
    opt_eps: float | None = _optim(None, "epsilon (the optimizer's own)", 0)
    opt_betas: tuple[float, ...] | None = _optim(None, "betas (the optimizer's own)", length=2)
    opt_kwargs: dict[str, Any] | None = _optim(None, "further arguments of the optimizer, as in fused=true")  # noqa: RUF009
    layer_decay: float | None = _optim(None, "factor of the learning rate from each layer to the one below", 0, 1)
    layer_decay_min_scale: float = _optim(0.0, "the least that layer_decay makes of it", 0, 1)
    layer_decay_no_opt_scale: float | None = _optim(None, "layers with less of it are not trained", 0, 1)
    clip_grad: float | None = _optim(None, "limit of the gradient (none)", 0, also=("max_grad_norm",))
    clip_mode: str = _optim("norm", "what clip_grad limits", choices=one_of("norm", "value", "agc"))
    grad_accum_steps: int = _optim(1, "batches whose gradients make one step", 1, also=("accumulation_steps",))

    epochs: int = _sched(300, "passes over the training images", 1, also=("num_epochs",))
    batch_size: int = _sched(128, "images a batch and process", 1)
    validation_batch_size: int | None = _sched(None, "images a batch of evaluation (batch_size)", 1)
    sched: str = _sched("cosine", "how the learning rate falls", choices=lambda: SCHEDULES,
                        also=("scheduler", "lr_scheduler"))  # fmt: skip
    sched_on_updates: bool = _sched(False, "adapt the learning rate after every step, not only after every epoch")
    warmup_epochs: float = _sched(5, "epochs in which the learning rate rises", 0)
    warmup_prefix: bool = _sched(False, "count the warm-up epochs apart from epochs")
    warmup_lr: float = _sched(1e-6, "learning rate at the very start", 0)
    min_lr: float = _sched(0.0, "learning rate at the very end", 0)
    cooldown_epochs: int = _sched(0, "further epochs at min_lr", 0)
    decay_epochs: float | None = _sched(
        None, "step: epochs between falls [90]; wsd, rsqrt: length of the fall [0.2]", 0
    )
    decay_milestones: tuple[float, ...] = _sched((90, 180, 270), "multistep: epochs at which the learning rate falls")
    decay_rate: float = _sched(0.1, "step, multistep: factor of a fall", 0)
    lr_k_decay: float = _sched(1.0, "cosine, poly: exponent of the time, above 1 stays high longer", 0)

    train_img_sizes: tuple[int, ...] | None = _sizes(None, "sides of square images, one drawn for each batch")
    train_batch_sizes: tuple[int, ...] | None = _sizes(None, "batch size at each of them (batch_size)")
    train_size_probs: tuple[float, ...] | None = _sizes(None, "how often each is drawn (equally)")
    train_size_schedule: str = _sizes("constant", "progressive moves from the first size to the last over the epochs",
                                      choices=one_of("constant", "progressive"))  # fmt: skip
    train_size_schedule_spread: float = _sizes(0.65, "progressive: how far around the size of the day, in sizes", 0)
    train_size_random_mix: float = _sizes(0.1, "progressive: share drawn from all sizes", 0, 1)
    train_batches_per_epoch: int | None = _sizes(None, "batches an epoch (as many as the images make)", 1)

    no_aug: bool = _augment(False, "train on the images as they are")
    train_crop_mode: str | None = _augment(None, "how training images are cropped (rrc)",
                                           choices=one_of("rrc", "rkrc", "rkrr"))  # fmt: skip
    scale: tuple[float, ...] = _augment(
        (0.08, 1.0), "share of the area that a random crop keeps, least and most", 0, length=2, rising=True
    )
    ratio: tuple[float, ...] = _augment((3 / 4, 4 / 3), "aspect ratio of a random crop, least and most", 1e-3, length=2,
                                      rising=True)  # fmt: skip
    hflip: float = _augment(0.5, "probability of mirroring left to right", 0, 1)
    vflip: float = _augment(0.0, "probability of mirroring top to bottom", 0, 1)
    color_jitter: float = _augment(0.4, "strength of changes in brightness, contrast and saturation; off with aa", 0)
    color_jitter_prob: float | None = _augment(None, "probability of those (always, and then not with aa)", 0, 1)
    grayscale_prob: float | None = _augment(None, "probability of taking the colour away", 0, 1)
    gaussian_blur_prob: float | None = _augment(None, "probability of blurring", 0, 1)
    aa: str | None = _augment(None, "AutoAugment policy such as rand-m9-mstd0.5-inc1", also=("auto_augment",))
    aug_repeats: float = _augment(0, "draw each image so often in an epoch, of so many fewer images", 0,
                                  also=("repeated_aug", "num_aug_repeats"))  # fmt: skip
    reprob: float = _augment(0.0, "probability of erasing a random rectangle", 0, 1, also=("re_prob",))
    remode: str = _augment("pixel", "what an erased rectangle holds", choices=one_of("pixel", "rand", "const"))
    recount: int = _augment(1, "rectangles to erase, at most", 1)
    train_interpolation: str = _augment("random", "how training images are resized",
                                        choices=one_of("random", *RESIZES))  # fmt: skip
    mixup: float = _augment(0.0, "alpha of mixup; 0 is off", 0)
    cutmix: float = _augment(0.0, "alpha of cutmix; 0 is off", 0)
    cutmix_minmax: tuple[float, ...] | None = _augment(None, "least and most side of what cutmix cuts", 0, 1, length=2,
                                                        rising=True)  # fmt: skip
    mixup_prob: float = _augment(1.0, "probability of mixing a batch, where mixup or cutmix is on", 0, 1)
    mixup_switch_prob: float = _augment(0.5, "probability of cutmix rather than mixup, where both are on", 0, 1)
    mixup_mode: str = _augment("batch", "what shares one draw of mixing", choices=one_of("batch", "pair", "elem"))
    mixup_off_epoch: int = _augment(0, "mix no more from this epoch on; 0 always mixes", 0)
    smoothing: float = _augment(0.1, "label smoothing", 0, 1, also=("label_smoothing",))
    bce_loss: bool = _augment(False, "one yes or no a class, instead of one choice among all")
    bce_target_thresh: float | None = _augment(None, "bce_loss: mixed targets above it count as 1", 0, 1)
    bce_sum: bool = _augment(False, "bce_loss: sum over the classes instead of their mean")
    model_ema: bool = _augment(False, "also keep, evaluate and save a moving average of the weights", also=("ema",))
    model_ema_decay: float = _augment(0.9998, "how much of the average stays at each step", 0, 1)
    model_ema_warmup: bool = _augment(False, "let the decay grow to its value")

    device: str | None = _run(None, "cpu, cuda, cuda:1, mps (the accelerator if there is one)")
    amp: bool = _run(False, "mixed precision: multiplications in amp_dtype, weights and scan states in float32")
    amp_dtype: str = _run("bfloat16", "bfloat16 needs no loss scaling; float16 gets it",
                          choices=one_of("bfloat16", "float16"))  # fmt: skip
    fsdp: bool = _run(False, "share weights, gradients and optimizer out over the processes, block by block")
    sync_bn: bool = _run(False, "batch norms see the images of all processes")
    dist_bn: str = _run("reduce", "how the processes' batch norm statistics meet after an epoch",
                        choices=one_of("reduce", "broadcast", ""))  # fmt: skip
    seed: int = _run(42, "of weights, order, augmentation and dropout; on a CPU it settles the run bit for bit", 0)
    deterministic: bool = _run(False, "take algorithms that repeat to the last bit: seed settles runs on a GPU too")
    output: str = _run("output", "folder of all runs", also=("output_dir", "out"))
    experiment: str | None = _run(None, "folder of this run under output (the model's name)", also=("name",))
    overwrite: bool = _run(False, "replace a run that lies in that folder", kept=False)
    resume: str | None = _run(
        None, "continue from this checkpoint, or 'auto': from the run's last one if it has any", kept=False
    )
    recovery_interval: int = _run(0, "also save every so many steps; 0 saves after each epoch only", 0)
    max_bad_steps: int = _run(10, "stop when more steps of an epoch were left out for NaN or inf", 0)
    log_interval: int = _run(50, "steps between two lines of the log where there is no terminal to draw a bar on", 1)
    log_tensorboard: bool = _run(False, "also write the figures for TensorBoard", also=("tensorboard",))
    log_wandb: bool = _run(False, "also send the figures to Weights & Biases", also=("wandb",))
    wandb_project: str | None = _run(None, "project there")
    dry_run: bool = _run(False, "build everything, take one step on random images, write nothing", kept=False)

    @property
    def run_dir(self) -> Path:
        return Path(self.output) / (self.experiment or self.model.replace("/", "_").replace(":", "_"))

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


READER = Reader(
    Config,
    "tools/train.py",
    "Train an image classifier: any model of this package or of timm, on class folders or on digits.",
    """\
examples:
  tools/train.py --config configs/digits/vmamba.yaml                 the handwritten digits, a minute or two on a CPU
  tools/train.py --config configs/digits/vmamba.yaml --epochs 3 --seed 1 --experiment try
  tools/train.py --model vim_tiny_patch16_224 --data-dir my_images --batch-size 64 --amp
  tools/train.py --resume output/digits_vmamba/last.pth              continue an interrupted run, no other flag needed
  tools/train.py --config configs/digits/vmamba.yaml --resume auto   continue if there is something to continue
  torchrun --nproc-per-node 8 tools/train.py --config configs/in1k/vmamba_tiny.yaml --data-dir IMAGENET

my_images holds train/<class>/*.jpg and val/<class>/*.jpg. A flag wins over the config file; 'none' unsets an option.
A run writes output/<experiment>/: last.pth, previous.pth and best.pth (weights, optimizer, position), args.yaml,
summary.csv (one row an epoch), curves.png, train.log. Ctrl-C saves first and prints the command that continues.
exit status: 0 done, 1 failed, 2 wrong options, 130 Ctrl-C, 143 SIGTERM.""",
)
