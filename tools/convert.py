"""Turn a checkpoint of any family's authors, or of tools/train.py, into a folder for timm; --help shows how."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from timm.utils import ParseKwargs

from vision_mamba.train import convert
from vision_mamba.train.errors import ConfigError, TrainError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write model.safetensors and config.json, which timm.create_model('local-dir:FOLDER') loads.",
        epilog="""\
examples:
  tools/convert.py vssm1_tiny_0230s_ckpt_epoch_264.pth vmamba_tiny --model vmamba_tiny_s1l8
  tools/convert.py output/digits_vmamba/best.pth digits --ema
  tools/convert.py theirs.pth vim_tiny --model vim_tiny_patch16_224 --trust --dry-run

Every tensor must find its place: those missing or left over are named, and nothing is written. The folder is read back
by timm, and the difference of its logits to those of the source's weights is told. Files are read without running what
is in them; some authors' hold Python objects, such as the options of their run, which --trust reads all the same.
exit status: 0 done, 1 failed, 2 wrong options.""",
    )
    parser.add_argument("checkpoint", type=Path, help="file of weights: .pth, .pt, .ckpt, .safetensors")
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--model", help="registered name; checkpoints of tools/train.py say it")
    parser.add_argument("--model-kwargs", nargs="+", default={}, action=ParseKwargs, metavar="K=V",
                        help="arguments of its constructor, as in img_size=448")  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="take the averaged weights that are beside the others")
    parser.add_argument("--trust", action="store_true", help="read Python objects, which may run code; know the author")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")
    parser.add_argument("--dry-run", action="store_true", help="look whether everything fits, write nothing")
    return parser


def main(argv: list[str]) -> int:
    given = parser().parse_args(argv)
    try:
        if given.folder.exists() and not (given.overwrite or given.dry_run):
            raise ConfigError(f"{given.folder} exists; replace it with --overwrite.")
        source = convert.read(given.checkpoint, given.model, given.ema, given.trust, given.model_kwargs)
        model = convert.build(source)
        count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        sys.stdout.write(f"{source.name}: {len(source.weights)} tensors, all used; {count:.2f} M parameters\n")
        if source.arguments:
            sys.stdout.write(f"arguments: {yaml.safe_dump(source.arguments, default_flow_style=True, width=10**6)}")
        if given.dry_run:
            sys.stdout.write("dry run: nothing was written\n")
            return 0
        difference = convert.write(source, model, given.folder)
    except TrainError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.status
    sys.stdout.write(f"logits read back differ by {difference:.2g} of the largest\n")
    sys.stdout.write(f"load with: timm.create_model('local-dir:{given.folder}', pretrained=True)\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
