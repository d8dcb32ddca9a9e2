"""Write a model as files for other programs, each checked against the model; --help shows how."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from rich.console import Console
from rich.table import Table

from vision_mamba import __version__
from vision_mamba.export import FORMATS, ExportError, Request, export_model, median_ms
from vision_mamba.export.formats import SCANS, VARIES, listed
from vision_mamba.export.write import relative
from vision_mamba.provenance import provenance
from vision_mamba.text import destination, positive
from vision_mamba.train import model as models
from vision_mamba.train.errors import ConfigError, TrainError
from vision_mamba.train.images import digits
from vision_mamba.train.predict import Classifier, accuracy, load

COVERED = ("vision_mamba", "csrc", "tools/export.py")  # what a record depends on


def parser() -> argparse.ArgumentParser:
    width = max(map(len, FORMATS))
    formats = "\n".join(f"  {name:{width}}  {f.help}; scan: {' or '.join(f.scans)}" for name, f in FORMATS.items())
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write a model as files for other programs. Each file is read back, run, and compared with the "
        "model\nbefore it is put in place; a table tells sizes and times.",
        epilog=f"""\
formats:
{formats}

The scan is the library's operator, the quickest, which wants `import vision_mamba` in the Python that runs the file;
or it is spelled out in plain tensor operations, for one size of images, and the file runs without vision_mamba.
Files hold, as JSON named about.json, the classes and the preprocessing that the model was trained with.

examples:
  tools/export.py --checkpoint output/digits_vmamba/best.pth --format onnx
  tools/export.py --model vmamba_tiny_s1l8 --pretrained --format pt2 aoti --vary size
  tools/export.py --model vim_tiny_patch16_224 --features 5 11 17 23 --format onnx_script --img-size 512 640
  tools/export.py --checkpoint output/digits_vim/best.pth --format pt2 --int8

exit status: 0 all written, 1 one or more not, with the reason, 2 wrong options.""",
    )
    what = parser.add_argument_group("model")
    what.add_argument("--checkpoint", metavar="FILE", help="a checkpoint of tools/train.py")
    what.add_argument("--model", metavar="NAME", help="registered name; with --checkpoint only for bare weights")
    what.add_argument("--pretrained", action="store_true", help="with the published weights, downloaded if need be")
    what.add_argument("--num-classes", type=positive, metavar="N", help="classes of a model without checkpoint")
    what.add_argument(
        "--features", type=int, nargs="+", metavar="I", help="maps instead of logits: stages, or blocks of plain models"
    )
    file = parser.add_argument_group("file")
    file.add_argument("--format", nargs="+", choices=FORMATS, default=["onnx"], help="one or several [onnx]")
    file.add_argument("--out", type=Path, default=Path("output/exported"), metavar="DIR", help="[output/exported]")
    file.add_argument("--scan", choices=SCANS, help="the form of the scan [each format's first]")
    file.add_argument(
        "--vary",
        choices=VARIES,
        default="batch",
        help="what may differ from call to call: size is batch and size [batch]",
    )
    file.add_argument(
        "--img-size", type=positive, nargs="+", metavar="N", help="side, or height and width [that of the model]"
    )
    file.add_argument("--int8", action="store_true", help="weights of linear layers in int8, by torchao")
    file.add_argument("--digits", action="store_true", help="classify the held-out digits by each file as well")
    file.add_argument("--record", type=destination, metavar="FILE", help="append what was measured, as lines of JSON")
    times = parser.add_argument_group("times")
    times.add_argument("--batch-size", type=positive, default=1, metavar="N", help="images a call [1]")
    times.add_argument("--runs", type=positive, default=10, metavar="N", help="calls to take the median of [10]")
    times.add_argument("--threads", type=positive, metavar="N", help="of the CPU [all]")
    return parser


def main(argv: Sequence[str]) -> int:
    options = parser().parse_args(argv)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        classifier = chosen(options)
        name, model, config = classifier.name, classifier.model, classifier.data_config
        size = image_size(options.img_size, config)
    except TrainError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.status
    about = {"model": name, "image_size": size, "vary": options.vary}
    about |= {"classes": classifier.classes, "preprocessing": config}
    about |= {"vision_mamba": __version__, "torch": torch.__version__, "timm": timm.__version__}
    request = Request(model, size, options.scan, options.vary, options.int8, about)
    # A file for nothing but its example takes as many images as that has.
    images = request.example if options.vary == "none" else request.images(options.batch_size, *size)
    rows = [Row("PyTorch", "operator", median_ms(model, images, options.runs))]
    if options.digits:
        rows[0] = rows[0]._replace(accuracy=held_out(classifier, model))
    width = None if sys.stdout.isatty() else 160  # a table in a file is not folded
    console, failed = Console(stderr=True), False
    for kind in options.format:
        path = options.out / f"{name}{'.int8' if options.int8 else ''}{FORMATS[kind].suffix}"
        with console.status(f"{kind}: writing {path}"):
            try:
                done = export_model(kind, request, path)
            except ExportError as error:
                sys.stderr.write(f"error: {error}\n")
                failed = True
                continue
            time = median_ms(done.program.run, images, options.runs)
            right = held_out(classifier, done.program.run) if options.digits else None
        rows.append(Row(kind, done.scan, time, done.size, done.difference, right, path.name))
    title = f"{name}: {len(images)} x {images.shape[2]} x {images.shape[3]} pixels, {torch.get_num_threads()} threads"
    Console(width=width).print(table(f"{title}; files in {options.out}", rows))
    if options.record:
        source = provenance("cpu", *COVERED) | {"case": f"export_{name}", "int8": options.int8, "vary": options.vary}
        source["images"] = list(images.shape)
        with open(options.record, "a") as file:
            file.writelines(json.dumps(source | row._asdict()) + "\n" for row in rows)
    if options.int8:
        told = int8_difference(request)
        sys.stdout.write(f"int8 weights change the outputs by {told:.1e} of the largest one, before any export\n")
    return int(failed)


def chosen(options: argparse.Namespace) -> Classifier:
    """The model in eval mode with its name, preprocessing and classes.

    Raises: TrainError if the options contradict each other, or the checkpoint or model cannot be had.
    """
    if options.checkpoint is not None:
        if options.pretrained or options.num_classes or options.features:
            raise ConfigError("--pretrained, --num-classes and --features are for models without --checkpoint.")
        return load(options.checkpoint, torch.device("cpu"), options.model)
    if options.model is None:
        raise ConfigError("say what to export: --checkpoint FILE or --model NAME.")
    if options.digits:
        raise ConfigError("--digits is for a --checkpoint that was trained on them.")
    models.check_name(options.model)
    arguments: dict[str, Any] = {"pretrained": options.pretrained}
    if options.features:
        arguments |= {"features_only": True, "out_indices": options.features}
    elif options.num_classes:
        arguments |= {"num_classes": options.num_classes}
    model = models.build(options.model, {}, arguments).eval()
    config = models.data_config(getattr(model, "model", model), {})
    return Classifier(options.model.split(".")[0], model, [], config, torch.device("cpu"))


def held_out(classifier: Classifier, run: Callable[[torch.Tensor], Any]) -> float | None:
    """Accuracy on the held-out digits of the model in another form."""
    other = dataclasses.replace(classifier, model=lambda images: listed(run(images))[0])  # type: ignore[arg-type]
    return accuracy(other.predict(digits(True, classifier.mode)))


def image_size(sides: list[int] | None, config: dict[str, Any]) -> tuple[int, int]:
    if sides is None:
        sides = list(config["input_size"][1:])
    if len(sides) > 2:
        raise ConfigError(f"--img-size takes a side, or height and width; got {len(sides)} numbers.")
    return sides[0], sides[-1]


def int8_difference(request: Request) -> float:
    with torch.no_grad():
        pairs = zip(listed(request.reference(request.example)), listed(request.model(request.example)), strict=True)
        return max(relative(narrow, wide) for narrow, wide in pairs)


class Row(NamedTuple):
    """One line of the table and of the record: milliseconds a call, bytes, percent of the held-out digits."""

    format: str
    scan: str
    ms: float
    bytes: int | None = None
    difference: float | None = None
    accuracy: float | None = None
    file: str = ""


def table(title: str, rows: list[Row]) -> Table:
    drawn = Table(title=title, title_justify="left")
    for heading in ("format", "scan", "MB", "difference", "ms a call", "digits, %", "file"):
        drawn.add_column(heading, justify="left" if heading in ("format", "scan", "file") else "right")
    for row in rows:
        size = "" if row.bytes is None else f"{row.bytes / 1e6:.2f}"
        difference = "" if row.difference is None else f"{row.difference:.0e}"
        right = "" if row.accuracy is None else f"{row.accuracy:.2f}"
        drawn.add_row(row.format, row.scan, size, difference, f"{row.ms:.1f}", right, row.file)
    return drawn


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
