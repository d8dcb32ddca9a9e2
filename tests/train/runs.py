"""Tiny runs: two classes of drawn images, a few steps an epoch, a second or two on one core."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from vision_mamba.train.checkpoint import LAST
from vision_mamba.train.engine import Position
from vision_mamba.train.options import Config
from vision_mamba.train.progress import Progress
from vision_mamba.train.run import prepare, train

ROOT = Path(__file__).resolve().parents[2]
STEPS = 3  # of an epoch of `config`


def draw(folder: Path, train: int = 6, held_out: int = 3) -> Path:
    """Class folders of noise with a bright upper or a bright left half."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", held_out)):
        for name in ("left", "upper"):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 100, (16, 16, 3), dtype=np.uint8)
                (pixels[:8] if name == "upper" else pixels[:, :8])[:] += 150
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def config(folder: Path, **options: Any) -> Config:
    """A run on the images drawn into `folder/images`, with dropped paths and mixing, to draw from all generators."""
    small = Config(
        data_dir=str(folder / "images"),
        model="test_vmamba",
        model_kwargs={"dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        img_size=32,
        drop_path=0.2,
        mixup=0.5,
        epochs=2,
        batch_size=4,
        warmup_epochs=0,
        sched_on_updates=True,
        lr=1e-3,
        workers=0,
        device="cpu",
        output=str(folder / "output"),
        experiment="run",
        seed=3,
    )
    return dataclasses.replace(small, **options)


def fit(config: Config) -> Position:
    """What tools/train.py does with the options."""
    return train(config, prepare(config), Progress(Console(file=io.StringIO()), log_interval=1))


def weights(run_dir: Path, name: str = LAST) -> dict[str, torch.Tensor]:
    return torch.load(run_dir / name, weights_only=True)["state_dict"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def flags(config: Config) -> list[str]:
    """The options as words of a command line."""
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={item}" for key, item in value.items())]
        elif isinstance(value, tuple):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def environment(**more: str) -> dict[str, str]:
    """The variables of a process that runs this checkout on one thread, like the tests."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def start(*words: str) -> subprocess.Popen[str]:
    """tools/train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "tools/train.py", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
