"""Pictures of what the library does and of what a trained model sees.

    python tools/visualize.py order --order cross --image photo.jpg --grid 7x7 --out cross.png
    python tools/visualize.py order --order cross bidirectional local_2 snake --grid 8x8 --out docs/scan_orders.png
    python tools/visualize.py order --order cross local_2 --grid 8x8 --out docs/insight_orders.gif
    python tools/visualize.py attention --checkpoint output/digits_vmamba/last.pth --out docs/insight_attention.png
    python tools/visualize.py grad-cam --checkpoint output/run/best.pth --image cat.jpg dog.jpg --out cam.png

Without --image the picture of scan orders is the photograph of a dahlia that scikit-learn ships (by Flickr user
vultilion, CC BY 2.0), and a model is shown the first held-out handwritten digits.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_mamba import scans
from vision_mamba.text import destination, positive

if TYPE_CHECKING:
    from torch import Tensor

    from vision_mamba.train.predict import Classifier


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


def picture(text: str) -> Path:
    """A file to write, whose ending says in which format; its folder is made if there is none."""
    path = Path(text)
    if not path.suffix or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file whose ending tells its format, such as .png, got {text!r}")
    return Path(destination(text))


def load(path: Path | None):
    from PIL import Image, UnidentifiedImageError

    from vision_mamba.train.images import eight_bits

    if path is None:
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image("flower.jpg"))
    try:
        return eight_bits(Image.open(path), "RGB")
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise SystemExit(f"visualize: cannot read the image {path}: {error}") from error


def check_ending(path: Path) -> None:
    """Before the work is done that is to be drawn."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise SystemExit(f"visualize: cannot write {path}: its ending must be one of {', '.join(sorted(known))}.")


def save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path)
    except OSError as error:
        raise SystemExit(f"visualize: cannot write {path}: {error}") from error
    if path.suffix.lower() == ".png":
        shrink(path)


def shrink(path: Path) -> None:
    """Rewrite a PNG with a palette of 256 colours, a quarter of its size."""
    from PIL import Image

    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def draw_order(options: argparse.Namespace) -> None:
    from vision_mamba.viz import animate_orders, draw_orders

    image = load(options.image)
    if options.out.suffix.lower() != ".gif":
        save(draw_orders(options.order, image, options.grid), options.out)
        return
    try:
        animate_orders(options.order, image, options.out, options.grid)
    except OSError as error:
        raise SystemExit(f"visualize: cannot write {options.out}: {error}") from error


class Subject:
    """A trained model, the images it is shown, and these as pictures.

    Args:
        options: checkpoint; image, a list or None; images, how many digits.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        from vision_mamba.train import predict
        from vision_mamba.train.errors import TrainError

        try:
            self.classifier: Classifier = predict.load(str(options.checkpoint), torch.device("cpu"))
            self.images, self.targets = self._images(options)
        except TrainError as error:
            raise SystemExit(f"visualize: {error}") from error
        self.model: Any = self.classifier.model
        mean, std = (torch.tensor(self.classifier.data_config[key]).view(-1, 1, 1) for key in ("mean", "std"))
        shown = (self.images * std + mean).clamp(0, 1)
        self.pictures = [picture.numpy() for picture in (shown[:, 0] if shown.shape[1] == 1 else shown.movedim(1, -1))]

    def _images(self, options: argparse.Namespace) -> tuple[Tensor, list[str | None]]:
        """The images as the model takes them, and what is on them where that is known."""
        import torch
        from timm.data import create_transform

        from vision_mamba.train.images import digits, files

        classifier = self.classifier
        if options.image is None:
            found = digits(True, classifier.mode)
        else:
            found = files(options.image, classifier.mode, classifier.classes)
        config = {key: value for key, value in classifier.data_config.items() if key != "num_classes"}
        transform: Any = create_transform(**config)
        count = min(options.images, len(found))
        names = [found.classes[target] if target >= 0 else None for target in list(found.targets)[:count]]
        return torch.stack([transform(found.image(i)) for i in range(count)]), names

    @property
    def stages(self) -> list[int]:
        """Entries of feature_info to show: every one of a pyramid, four of a plain model."""
        depth = len(self.model.feature_info)
        return list(range(depth)) if depth <= 4 else [round(i * (depth - 1) / 3) for i in range(4)]

    def maps(self, index: int, images: Tensor) -> Tensor:
        """The map (B, C, h, w) of an entry of feature_info."""
        return self.model.forward_intermediates(images, indices=[index], intermediates_only=True)[0]

    def captions(self) -> list[str]:
        """Class found, and the true one where it is another."""
        import torch

        with torch.no_grad():
            found = [self.classifier.classes[i] for i in self.model(self.images).argmax(1).tolist()]
        return [
            f"found {one}" + (f", is {true}" if true not in (None, one) else "")
            for one, true in zip(found, self.targets, strict=True)
        ]


def draw_field(options: argparse.Namespace) -> None:
    """A panel for each stage: how much each pixel moves the middle of its map."""
    from vision_mamba.viz import Panel, draw_panels, effective_receptive_field

    subject = Subject(options)
    row = []
    for index in subject.stages:
        # Spread evenly over what an eye tells apart; most of the field is faint.
        field = effective_receptive_field(partial(subject.maps, index), subject.images) ** 0.2
        row.append(Panel(subject.model.feature_info[index]["module"], heat=field.numpy()))
    save(draw_panels([row]), options.out)


def draw_cam(options: argparse.Namespace) -> None:
    """Images above, and below where the evidence for the class found lies."""
    from vision_mamba.viz import Panel, draw_panels, grad_cam

    subject = Subject(options)
    cams = grad_cam(subject.model, subject.images, options.target, options.index)
    above = [Panel(caption, picture) for caption, picture in zip(subject.captions(), subject.pictures, strict=True)]
    below = [Panel("", picture, cam.numpy()) for picture, cam in zip(subject.pictures, cams, strict=True)]
    save(draw_panels([above, below]), options.out)


def draw_attention(options: argparse.Namespace) -> None:
    """A row for each chosen layer: what the middle patch reads along each route, and along all of them."""
    from vision_mamba.viz import Panel, draw_panels, implicit_attention, scans_of

    subject = Subject(options)
    rows = []
    for scan in _chosen(scans_of(subject.model, subject.images[:1]), options.layer):
        height, width = scan.grid
        reader = int(scan.patches[height // 2 * width + width // 2])
        mark = ((width // 2 + 0.5) / width, (height // 2 + 0.5) / height)
        read = scan.maps(implicit_attention(scan)[0, :, reader])
        names = ["all routes", *(f"route {k}" for k in range(len(read)))]
        maps = [read.sum(0), *read]
        picture = subject.pictures[0]
        panels = [Panel(name, picture, one.numpy(), mark) for name, one in zip(names, maps, strict=True)]
        rows.append([Panel(scan.layer, picture, mark=mark), *panels])
    save(draw_panels(rows), options.out)


def draw_routes(options: argparse.Namespace) -> None:
    """A row for each chosen layer: how strongly each route answers at each patch."""
    from vision_mamba.viz import Panel, draw_panels, route_maps, scans_of

    subject = Subject(options)
    rows = []
    for scan in _chosen(scans_of(subject.model, subject.images[:1]), options.layer):
        panels = [Panel(f"route {k}", None, one.numpy()) for k, one in enumerate(route_maps(scan)[0])]
        rows.append([Panel(scan.layer, subject.pictures[0]), *panels])
    save(draw_panels(rows), options.out)


def _chosen(found: list[Any], names: list[str] | None) -> list[Any]:
    """The scans of the layers named, or of those whose maps have at least 16 patches, four at most; of one image."""
    for scan in found:
        if scan.call.batch > 1:
            raise SystemExit(
                f"visualize: {scan.layer} scans {scan.call.batch} windows of the image, each by itself; show images "
                f"of one window, {scan.grid[0]} x {scan.grid[1]} patches."
            )
    if names is None:
        large = [scan for scan in found if len(scan.patches) >= 16] or found
        return [large[round(i * (len(large) - 1) / 3)] for i in range(4)] if len(large) > 4 else large
    known = {scan.layer: scan for scan in found}
    for name in names:
        if name not in known:
            raise SystemExit(f"visualize: no layer {name!r} scans; known are {', '.join(known)}.")
    return [known[name] for name in names]


def draw_pca(options: argparse.Namespace) -> None:
    """Images above, and a row for each stage: alike features in alike colours, over all images."""
    import torch

    from vision_mamba.viz import Panel, draw_panels, feature_pca

    subject = Subject(options)
    rows = [[Panel(caption, picture) for caption, picture in zip(subject.captions(), subject.pictures, strict=True)]]
    for index in subject.stages:
        with torch.no_grad():
            maps = subject.maps(index, subject.images)
        if maps.shape[2] * maps.shape[3] == 1:
            continue  # one colour an image
        colours = feature_pca(maps)
        name = subject.model.feature_info[index]["module"]
        rows.append([Panel("" if i else name, one.numpy()) for i, one in enumerate(colours)])
    save(draw_panels(rows), options.out)


#: Subcommands that show a trained model: what draws, what is said of it, how many images by default.
MODEL_COMMANDS = {
    "erf": (draw_field, "effective receptive field of each stage, a mean over images", 64),
    "grad-cam": (draw_cam, "where on images the evidence for a class lies", 8),
    "attention": (draw_attention, "implicit attention of selective scans: what one patch reads, route by route", 1),
    "routes": (draw_routes, "how strongly each route of selective scans answers at each patch", 1),
    "pca": (draw_pca, "main components of features, as colours", 8),
}


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(required=True, metavar="|".join(("order", *MODEL_COMMANDS)))
    command = commands.add_parser("order", help="scan orders as paths over the patches of an image; .gif moves")
    command.add_argument("--order", type=order, nargs="+", required=True, help=f"of {', '.join(scans.names())}")
    command.add_argument("--image", type=Path, help="a picture; its middle is cut to the shape of the grid")
    command.add_argument("--grid", type=grid, default=(7, 7), help="rows x columns of patches (default 7x7)")
    command.add_argument("--out", type=picture, required=True, help="file to write, .png, .gif, .pdf or .svg")
    command.set_defaults(run=draw_order)
    for name, (draw, said, count) in MODEL_COMMANDS.items():
        command = commands.add_parser(name, help=said, description=said)
        command.add_argument("--checkpoint", type=Path, required=True, help="of tools/train.py")
        command.add_argument(
            "--image", nargs="+", help="files or folders; the held-out digits of scikit-learn by default"
        )
        command.add_argument("--images", type=positive, default=count, help=f"how many at most (default {count})")
        command.add_argument("--out", type=picture, required=True, help="file to write, .png, .pdf or .svg")
        if name in ("attention", "routes"):
            command.add_argument("--layer", nargs="+", help="names of mixers, as in stages.0.blocks.0.ss2d")
        if name == "grad-cam":
            command.add_argument("--target", type=int, help="number of the class (the one found)")
            command.add_argument("--index", type=int, help="entry of feature_info (the last that tells of patches)")
        command.set_defaults(run=draw)
    options = parser.parse_args(arguments)
    try:
        check_ending(options.out)
        options.run(options)
    except ModuleNotFoundError as error:
        needed = "pip install 'vision-mamba-timm[demo]'"
        raise SystemExit(f"visualize: {error.name} is not installed; {needed} brings what pictures need.") from error
    except ValueError as error:
        raise SystemExit(f"visualize: {error}") from error
    sys.stdout.write(f"{options.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
