"""Measure how right trained models are on held-out images, and how fast; --help shows how."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vision_mamba.provenance import provenance
from vision_mamba.text import destination, natural, positive
from vision_mamba.train import checkpoint, validate
from vision_mamba.train import model as models
from vision_mamba.train.bad_images import BadImages
from vision_mamba.train.datasets import held_out_images, image_sets
from vision_mamba.train.errors import ConfigError, TrainError
from vision_mamba.train.guards import ImageGuard
from vision_mamba.train.images import ImageSet
from vision_mamba.train.journal import rows
from vision_mamba.train.learner import HALVES, Learner
from vision_mamba.train.loader import evaluation_feed, training_feed
from vision_mamba.train.options import READER, Config
from vision_mamba.train.parallel import World
from vision_mamba.train.predict import Classifier, load, named
from vision_mamba.train.progress import Progress, logging_to

LOAD = "loading, as for validation", "loading, as for training", "model, forward", "model, training step"

# Of the options of a run, those that its record tells; of its checkpoint, what the data and the processes were.
TRAINED = (
    *("model", "model_kwargs", "img_size", "epochs", "batch_size", "grad_accum_steps", "opt", "lr", "weight_decay"),
    *("amp", "amp_dtype", "torchcompile", "fsdp", "model_ema", "workers", "seed"),
)
RUN = ("processes", "images", "seconds")
REMEDY = (
    "Raise --workers (now {workers}), store the images smaller (a shorter side of twice the crop is enough), put them "
    "on a local disk or into tar files, install pillow-simd, or augment less."
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Top-1 and top-5 accuracy, loss and images a second of one or several models.",
        epilog="""\
examples:
  tools/validate.py --checkpoint output/vim/best.pth --data-dir my_images
  tools/validate.py --checkpoint output/digits_vmamba/best.pth output/digits_vim/best.pth --digits
  tools/validate.py --model vmamba_tiny_s1l8 vim_tiny_patch16_224 --data-dir IMAGENET --amp --csv imagenet.csv
  tools/validate.py --model vmamba_tiny_s1l8 --weights vssm1_tiny_0230s_ckpt_epoch_264.pth --data-dir IMAGENET
  tools/validate.py --model local-dir:vmamba_tiny --data-dir IMAGENET --real-labels real.json
  tools/validate.py --model vmamba_tiny_s1l8 --data-dir IMAGENET --throughput configs/in1k/vmamba_tiny.yaml --workers 16

--throughput compares what the loader gives with what the model takes, validating and training, and says which of the
two the other waits for. DIR holds val/<class>/*.jpg; with --val-split . it holds the class folders itself.
exit status: 0 done, 1 failed, 2 wrong options.""",
    )
    parser.add_argument("--checkpoint", nargs="+", default=[], metavar="FILE", help="trained by tools/train.py")
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="registered names, or local-dir:FOLDER")
    parser.add_argument("--weights", metavar="FILE", help="weights of the one --model, instead of the published")
    parser.add_argument("--data-dir", metavar="DIR", help="where the held-out images are")
    parser.add_argument("--digits", action="store_true", help="the held-out handwritten digits of scikit-learn")
    parser.add_argument("--dataset", default="folder", help="as for tools/train.py [folder]")
    parser.add_argument(
        "--val-split", default="validation", help="folder under DIR; val, valid, eval are found as well"
    )
    parser.add_argument("--class-map", metavar="FILE", help="class names in the order of the model's outputs")
    parser.add_argument("--real-labels", metavar="FILE", help="JSON of several labels an image, as of ReaL")
    parser.add_argument("--img-size", type=positive, metavar="N", help="side of the images [the model's own]")
    parser.add_argument("--crop-pct", metavar="X", help="share of the side that is kept [the model's own]")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images a batch [64]")
    parser.add_argument("--workers", type=natural, default=2, metavar="N", help="processes that load [2]")
    parser.add_argument("--device", help="cpu, cuda, mps [the accelerator if there is one]")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument("--amp-dtype", choices=tuple(HALVES), default="bfloat16", help="[bfloat16]")
    parser.add_argument(
        "--skip-bad-images", type=natural, default=0, metavar="N", help="pass over so many unreadable [0]"
    )
    parser.add_argument("--throughput", nargs="?", const="", metavar="CONFIG", help="speeds, augmenting as that config")
    parser.add_argument("--batches", type=positive, default=20, metavar="N", help="batches a speed is taken over [20]")
    parser.add_argument("--csv", type=destination, metavar="FILE", help="write the table as well")
    parser.add_argument(
        "--json", type=destination, metavar="FILE", help="append a line for each model, with where it comes from"
    )
    parser.add_argument("--dry-run", action="store_true", help="build models and find images, measure nothing")
    return parser


def main(argv: list[str]) -> int:
    given = parser().parse_args(argv)
    console = Console()
    try:
        if not (given.checkpoint or given.model) or (given.weights and len(given.model) != 1):
            raise ConfigError("give --checkpoint FILE or --model NAME, and --weights FILE with one --model.")
        if given.checkpoint and (given.img_size or given.crop_pct):
            raise ConfigError(
                "--img-size and --crop-pct go with --model; a checkpoint has the sizes it was trained with."
            )
        found: list[dict[str, Any]] = []
        with logging_to(Console(stderr=True)):
            for label, make in sources(given):
                classifier = make()
                measured = accuracy if given.throughput is None else speeds
                found.append({"model": label} | measured(classifier, given))
    except TrainError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.status
    console.print(drawn(found))
    if given.throughput is not None and not given.dry_run:
        for row in found:
            sys.stdout.write(advice(row, given.workers))
    try:
        keep(found, given)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename} cannot be written: {error.strerror}.\n")
        return 1
    return 0


def keep(found: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Write the rows where they are asked for."""
    if given.csv:
        with open(given.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    if given.json:
        with open(given.json, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record(row, given)) + "\n" for row in found)


def record(row: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """A row as results/ keeps it: with where it comes from and, of a run of tools/train.py, how that was trained."""
    case = "validation" if given.throughput is None else "throughput"
    told = {"case": case, "data": "digits" if given.digits else given.data_dir or given.dataset, **row}
    if row["model"] in given.checkpoint:
        content = checkpoint.read(row["model"])
        trained = content.get("args") or {}
        told |= {"trained": {name: trained.get(name) for name in TRAINED} | {name: content.get(name) for name in RUN}}
        told |= {"curve": rows(Path(row["model"]).parent)}
    return {**provenance(models.device(given.device), "vision_mamba", "tools", "configs", "csrc"), **told}


def sources(given: argparse.Namespace) -> list[tuple[str, Callable[[], Classifier]]]:
    """What each model is called, and how it is made; one is in memory at a time."""
    device = models.device(given.device)
    crop = None if given.crop_pct is None else READER.rules["crop_pct"].checked(given.crop_pct, "--crop-pct")
    options = {"img_size": given.img_size, "crop_pct": crop}
    return [(path, partial(load, path, device)) for path in given.checkpoint] + [
        (name, partial(named, name, device, given.weights, options, pretrained=given.throughput is None))
        for name in given.model  # random weights are as fast
    ]


def config_of(given: argparse.Namespace) -> Config:
    """The options on images, as training has them."""
    dataset = READER.rules["dataset"].checked(given.dataset, "--dataset")
    chosen = {"dataset": "digits" if given.digits else dataset, "data_dir": given.data_dir}
    chosen |= {"val_split": given.val_split, "class_map": given.class_map, "workers": given.workers}
    return Config(**chosen, batch_size=given.batch_size, skip_bad_images=given.skip_bad_images)


def accuracy(classifier: Classifier, given: argparse.Namespace) -> dict[str, Any]:
    """One model's row of the table of accuracies."""
    known = classifier.classes if classifier.named_classes else None
    images = held_out_images(config_of(given), classifier.mode, known)
    bad = BadImages()
    if isinstance(images, ImageSet):
        images.bad = bad
        validate.check_classes(images, classifier)
    feed = evaluation_feed(images, classifier.data_config, given.batch_size, given.workers, World(classifier.device))
    real = None
    if given.real_labels:
        assert isinstance(images, ImageSet)
        real = validate.RealLabels(validate.read_labels(given.real_labels), images.names)
    if given.dry_run:
        return {"images": len(images), "batches": len(feed)}
    half = HALVES[given.amp_dtype] if given.amp else None
    with Progress(Console(stderr=True)).bar(classifier.name, len(feed)) as bar:
        measured = validate.measure(classifier, feed, half, real, bar.advance)
    guard = ImageGuard(given.skip_bad_images, bad)
    guard.judge(guard.look())
    row = {key: value for key, value in dataclasses.asdict(measured).items() if key != "name" and value is not None}
    return row | {"size": classifier.data_config["input_size"][-1]}


def speeds(classifier: Classifier, given: argparse.Namespace) -> dict[str, Any]:
    """One model's row of the table of speeds, in images a second."""
    config, device, size = config_of(given), classifier.device, classifier.data_config["input_size"]
    if given.throughput:
        told = {name: getattr(config, name) for name in ("dataset", "data_dir", "val_split", "workers", "batch_size")}
        config = Config(**{**READER.read_yaml(given.throughput), **told})
    training, held_out, _ = image_sets(config, classifier.mode)
    if given.dry_run:
        return {"images to train on": len(training), "held out": len(held_out)}
    world, count = World(device), given.batch_size
    learner = Learner(config, classifier.model, world, 1, classifier.data_config)
    images = torch.randn(count, *size, device=device)
    targets = torch.randint(len(classifier.classes), (count,), device=device)
    half = torch.autocast(device.type, HALVES[given.amp_dtype], enabled=given.amp)

    def forward() -> None:
        classifier.model.eval()
        with torch.inference_mode(), half:
            classifier.model(images)

    def step() -> None:
        classifier.model.train()
        learner.gradients([(images, targets)], 0, 0).tolist()  # as training waits for them
        learner.apply(0, 1)

    feeds = (
        evaluation_feed(held_out, classifier.data_config, count, given.workers, world),
        training_feed(training, classifier.data_config, config, world),
    )
    rates = [validate.loading_rate(feed, given.batches) for feed in feeds]
    rates += [validate.model_rate(each, count, device, given.batches) for each in (forward, step)]
    return dict(zip(LOAD, rates, strict=True))


def advice(row: dict[str, Any], workers: int) -> str:
    """Who waits for whom, and what to do about it."""
    told = ""
    for what, loads, takes in (("validation", LOAD[0], LOAD[2]), ("training", LOAD[1], LOAD[3])):
        share = row[loads] / row[takes]
        told += f"{row['model']}, {what}: the loader gives {share:.2f} of what the model takes; "
        told += "the model sets the pace.\n" if share >= 1 else f"the model waits. {REMEDY.format(workers=workers)}\n"
    return told


def drawn(rows: list[dict[str, Any]]) -> Table:
    table = Table()
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
