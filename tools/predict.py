"""Classify images with trained checkpoints: a table, and on request a CSV file and a picture; --help shows how."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vision_mamba.text import positive
from vision_mamba.train import model as models
from vision_mamba.train.bad_images import unreadable, without_unreadable
from vision_mamba.train.errors import ConfigError, DataError, TrainError
from vision_mamba.train.images import ImageSet, digits, files
from vision_mamba.train.predict import Classifier, Prediction, accuracy, load, named
from vision_mamba.train.progress import Progress


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Say what is on images, with one or several checkpoints of tools/train.py.",
        epilog="""\
examples:
  tools/predict.py --checkpoint output/vim/best.pth photo.jpg holiday/ 'trips/**/*.png'
  find . -name '*.jpg' | tools/predict.py --checkpoint output/vim/best.pth - --json predictions.json
  tools/predict.py --model local-dir:vmamba_tiny photo.jpg --classes names.txt
  tools/predict.py --checkpoint output/vim/best.pth my_images/val --csv predictions.csv --png sheet.png
  tools/predict.py --digits --checkpoint output/digits_vmamba/last.pth --checkpoint output/digits_vim/last.pth

An image in a folder that bears the name of a class is taken to be of that class; then the accuracy is told, mistakes
come first in the table and stand out in the picture. exit status: 0 done, 1 failed, 2 wrong options.""",
    )
    parser.add_argument("inputs", nargs="*", metavar="IMAGE", help="files, folders, patterns; - reads names from stdin")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="FILE", help="a trained model; again for more"
    )
    parser.add_argument("--digits", action="store_true", help="take the held-out handwritten digits of scikit-learn")
    parser.add_argument("--model", help="registered name, of a file of bare weights; alone, with its published weights")
    parser.add_argument("--classes", metavar="FILE", help="names of the classes, one a line")
    parser.add_argument("--png", metavar="FILE", help="write a sheet of images with predictions and confidence")
    parser.add_argument("--csv", metavar="FILE", help="write all predictions, one row an image and a model")
    parser.add_argument("--json", metavar="FILE", help="the same as JSON")
    parser.add_argument("--top", type=positive, default=3, metavar="N", help="classes to tell of each image [3]")
    parser.add_argument(
        "--rows", type=positive, default=20, metavar="N", help="images in the table and, a model, the sheet [20]"
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="images a step [64]")
    parser.add_argument("--device", help="cpu, cuda, mps (the accelerator if there is one)")
    parser.add_argument(
        "--skip-bad-images", type=int, default=0, metavar="N", help="leave out up to so many unreadable images [0]"
    )
    return parser


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    console, progress = Console(), Progress(Console(stderr=True))
    try:
        if not (arguments.checkpoint or arguments.model):
            raise ConfigError("give --checkpoint FILE or --model NAME.")
        if "-" in arguments.inputs:
            lines = [line.rstrip("\n") for line in sys.stdin]
            arguments.inputs = [name for name in arguments.inputs if name != "-"] + [line for line in lines if line]
            if not arguments.inputs:
                raise ConfigError("stdin named no image; it is read for one name a line.")
        results = [classify(path, arguments, progress) for path in arguments.checkpoint or [None]]
        for classifier, _, predictions in results:
            console.print(table(classifier, predictions, arguments.rows))
        if arguments.csv:
            write_csv(arguments.csv, results)
        if arguments.json:
            write_json(arguments.json, results)
        if arguments.png:
            write_png(arguments.png, results, arguments.rows)
    except TrainError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.status
    what = "held-out accuracy" if arguments.digits else "accuracy"
    for classifier, _, predictions in results:
        if (percent := accuracy(predictions)) is not None:
            sys.stdout.write(f"{classifier.name} {what} {percent:.2f} %\n")
    return 0


Result = tuple[Classifier, ImageSet, list[Prediction]]


def classify(path: str | None, arguments: argparse.Namespace, progress: Progress) -> Result:
    """The images as one checkpoint's model sees them, and what it says of them."""
    if bool(arguments.inputs) == arguments.digits:
        raise ConfigError("give image files or folders, or --digits, and not both.")
    device = models.device(arguments.device)
    classifier = named(arguments.model, device) if path is None else load(path, device, arguments.model)
    if arguments.classes:
        classifier = dataclasses.replace(classifier, classes=names_in(arguments.classes, len(classifier.classes)))
    if arguments.digits:
        images = digits(True, classifier.mode)
    else:
        images = files(arguments.inputs, classifier.mode, classifier.classes)
        with progress.bar("checking images", len(images)) as bar:
            reasons = unreadable(images, os.cpu_count() or 1, lambda: bar.advance(1))
        images = without_unreadable(images, reasons, arguments.skip_bad_images, warn)
    with progress.bar(classifier.name, -(-len(images) // arguments.batch_size)) as bar:
        return classifier, images, classifier.predict(images, arguments.batch_size, arguments.top, bar.advance)


def names_in(path: str, count: int) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"--classes {path} cannot be read: {error.strerror}.") from error
    if len(names) != count:
        raise ConfigError(f"--classes {path} must hold {count:,} names, one a line, found {len(names):,}.")
    return names


def warn(message: str) -> None:
    sys.stderr.write(message + "\n")


def mistakes_first(predictions: list[Prediction]) -> list[Prediction]:
    return sorted(predictions, key=lambda prediction: prediction.right is not False)


def table(classifier: Classifier, predictions: list[Prediction], rows: int) -> Table:
    mistakes = sum(prediction.right is False for prediction in predictions)
    counted = f", {mistakes:,} mistakes" if any(p.right is not None for p in predictions) else ""
    left_out = f"; {len(predictions) - rows:,} more, all with --csv" if len(predictions) > rows else ""
    drawn = Table(title=f"{classifier.name}: {len(predictions):,} images{counted}{left_out}", title_justify="left")
    for heading in ("image", "prediction", "confidence", "then", "truth"):
        drawn.add_column(heading, justify="right" if heading == "confidence" else "left", overflow="fold")
    for prediction in mistakes_first(predictions)[:rows]:
        (name, confidence), *others = prediction.top
        style = {True: "green", False: "bold red", None: ""}[prediction.right]
        then = ", ".join(f"{other} {100 * p:.1f} %" for other, p in others)
        drawn.add_row(prediction.name, name, f"{100 * confidence:.1f} %", then, prediction.target or "", style=style)
    return drawn


def write_csv(path: str, results: list[Result]) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "image", "truth", "rank", "prediction", "confidence"])
            for classifier, _, predictions in results:
                for prediction in predictions:
                    for rank, (name, confidence) in enumerate(prediction.top, 1):
                        row = [
                            classifier.name,
                            prediction.name,
                            prediction.target or "",
                            rank,
                            name,
                            f"{confidence:.6f}",
                        ]
                        writer.writerow(row)
    except OSError as error:
        raise DataError(f"--csv {path} cannot be written: {error.strerror}.") from error


def write_json(path: str, results: list[Result]) -> None:
    content = [
        {
            "model": classifier.name,
            "image": prediction.name,
            "truth": prediction.target,
            "top": [{"class": name, "confidence": round(confidence, 6)} for name, confidence in prediction.top],
        }
        for classifier, _, predictions in results
        for prediction in predictions
    ]
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(content, indent=1), encoding="utf-8")
    except OSError as error:
        raise DataError(f"--json {path} cannot be written: {error.strerror}.") from error


def write_png(path: str, results: list[Result], rows: int) -> None:
    """A sheet of the mistakes, and of right predictions up to `rows` images a model."""
    from vision_mamba.viz.predictions import Tile, draw_predictions

    panels = []
    for classifier, images, predictions in results:
        chosen = mistakes_first(predictions)[:rows]
        tiles = [Tile(images.image(p.index), p.top[0][0], p.top[0][1], p.target) for p in chosen]
        percent = accuracy(predictions)
        told = "" if percent is None else f": {percent:.2f} % of {len(predictions):,} right"
        panels.append((classifier.name + told, tiles))
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        draw_predictions(panels, path)
    except OSError as error:
        raise DataError(f"--png {path} cannot be written: {error.strerror}.") from error
    sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
