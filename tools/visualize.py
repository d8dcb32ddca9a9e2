"""Draw what the library does.

    python tools/visualize.py order --order cross --image photo.jpg --grid 7x7 --out cross.png
    python tools/visualize.py order --order cross bidirectional local_2 snake --grid 8x8 --out docs/scan_orders.png

Without --image the picture is the photograph of a dahlia that scikit-learn ships (by Flickr user vultilion, CC BY 2.0).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from vision_mamba import scans


def grid(text: str) -> tuple[int, int]:
    """'7x7' -> (7, 7)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be rows x columns such as 7x7, got {text!r}")
    return int(found[1]), int(found[2])


def order(name: str) -> scans.ScanOrder:
    try:
        return scans.get(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def load(path: Path | None):
    from PIL import Image, UnidentifiedImageError

    if path is None:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image("flower.jpg"))
    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise SystemExit(f"visualize: cannot read the image {path}: {error}") from error


def draw_order(options: argparse.Namespace) -> None:
    from vision_mamba.viz import draw_orders

    try:
        draw_orders(options.order, load(options.image), options.grid).savefig(options.out)
    except (OSError, ValueError) as error:
        raise SystemExit(f"visualize: cannot write {options.out}: {error}") from error
    if options.out.suffix.lower() == ".png":
        shrink(options.out)


def shrink(path: Path) -> None:
    """Rewrite a PNG with a palette of 256 colours, a quarter of its size."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="order")
    command = commands.add_parser("order", help="scan orders as paths over the patches of an image")
    command.add_argument("--order", type=order, nargs="+", required=True, help=f"of {', '.join(scans.names())}")
    command.add_argument("--image", type=Path, help="a picture; its middle is cut to the shape of the grid")
    command.add_argument("--grid", type=grid, default=(7, 7), help="rows x columns of patches (default 7x7)")
    command.add_argument("--out", type=Path, required=True, help="file to write, .png, .pdf or .svg")
    command.set_defaults(run=draw_order)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ModuleNotFoundError as error:
        needed = "pip install 'vision-mamba-timm[demo]'"
        raise SystemExit(f"visualize: {error.name} is not installed; {needed} brings what pictures need.") from error
    sys.stdout.write(f"{options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
