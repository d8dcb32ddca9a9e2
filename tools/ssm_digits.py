"""Where the matrix A starts decides what a state-space model can learn: digits, read pixel by pixel.

    python tools/ssm_digits.py                                 # a quarter of an hour; the record and its page
    python tools/ssm_digits.py --inits legs random --seeds 1   # minutes; not on record without --out

One S4D layer of 16 channels reads the 64 pixels of an 8 x 8 digit (scikit-learn's, 1,797 of them, a quarter held out)
one after the other, and the last token is classified. What differs is the diagonal A, from HiPPO's or from a random
matrix, and whether it is trained. The step is one over the length of the sequence.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from vision_mamba.layers import MixerStack, SequenceClassifier
from vision_mamba.provenance import provenance
from vision_mamba.ssm import DIAGONALS, S4D

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "ssm_digits.jsonl"
PAGE = ROOT / "docs" / "state_spaces.md"
BEGIN, END = "<!-- table of results/ssm_digits.jsonl -->\n", "<!-- end of table -->\n"
HEAD = ("A starts as", "A stays fixed", "A is trained")
PIXELS, CLASSES = 64, 10
SETTING: dict[str, Any] = dict(dim=16, d_state=32, depth=1, batch=50, lr=5e-3, weight_decay=0.01)

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def load() -> Data:
    """Training images, test images (B, 64, 1), standardised; training labels, test labels. The split is fixed."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.from_numpy(part).float().unsqueeze(-1) for part in parts[:2])
    mean, std = train.mean(), train.std()
    return (train - mean) / std, (test - mean) / std, torch.from_numpy(parts[2]), torch.from_numpy(parts[3])


def build(init: str, train_a: bool) -> SequenceClassifier:
    step = 1 / PIXELS
    mixer = partial(S4D, d_state=SETTING["d_state"], init=init, dt_min=step, dt_max=step, train_a=train_a)
    stack = MixerStack(SETTING["dim"], SETTING["depth"], mixer, rescale=False)
    return SequenceClassifier(nn.Linear(1, SETTING["dim"]), stack, CLASSES, pool="last")


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).float().mean())


def train(init: str, train_a: bool, seed: int, epochs: int, data: Data, advance: Callable[[], None]) -> dict[str, Any]:
    """Train one model; what it is, and what share of test and training images it gets right."""
    torch.manual_seed(seed)
    images, test_images, labels, test_labels = data
    model, started = build(init, train_a), time.perf_counter()
    undecayed = model.no_weight_decay()
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in undecayed].append(parameter)
    decays = [dict(params=groups[True], weight_decay=SETTING["weight_decay"]), dict(params=groups[False])]
    optimizer = torch.optim.AdamW(decays, SETTING["lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(SETTING["batch"]):
            loss = F.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        advance()
    return {
        "init": init,
        "train_a": train_a,
        "seed": seed,
        "accuracy": round(accuracy(model, test_images, test_labels), 4),
        "train_accuracy": round(accuracy(model, images, labels), 4),
        "loss": round(loss.item(), 4),
        "seconds": round(time.perf_counter() - started, 1),
    }


def rows(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Of each start: mean and deviation of the test accuracy over seeds, in percent, with A fixed and trained."""
    for init in dict.fromkeys(r["init"] for r in records):
        cells = []
        for train_a in (False, True):
            found = [100 * r["accuracy"] for r in records if (r["init"], r["train_a"]) == (init, train_a)]
            cells.append(f"{statistics.mean(found):.1f} ± {statistics.pstdev(found):.1f}")
        yield init, cells[0], cells[1]


def markdown(records: list[dict[str, Any]]) -> str:
    """The rows as a table for a page."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|--:|--:|"]
    return (
        "\n".join([*lines, *(f"| `{init}` | {fixed} | {trained} |" for init, fixed, trained in rows(records))]) + "\n"
    )


def table(records: list[dict[str, Any]]) -> Table:
    """The rows as a table for a terminal."""
    shown = Table(*HEAD, title="test digits right, %, mean ± deviation")
    for row in rows(records):
        shown.add_row(*row)
    return shown


def publish(records: list[dict[str, Any]]) -> None:
    """Put the record's table on the page that shows it, between its two marks."""
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(BEGIN) + len(BEGIN)] + markdown(records) + text[text.index(END) :])


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--inits", nargs="+", choices=list(DIAGONALS), default=list(DIAGONALS), help="where A starts")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default 3)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, help=f"where the record goes; with no other option {RECORD.name}")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.epochs < 1:
        parser.error("--seeds and --epochs must be at least 1")
    default = vars(options) == vars(parser.parse_args([]))
    out: Path | None = RECORD if default else options.out
    torch.set_num_threads(1)  # threads cost more than they bring to models this small
    common = provenance() | {"case": "sequential_digits", "setting": SETTING | {"epochs": options.epochs}}

    console, data = Console(), load()
    runs = [(i, a, s) for i in options.inits for a in (False, True) for s in range(options.seeds)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    records = []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(runs) * options.epochs)
        for init, train_a, seed in runs:
            bar.update(task, description=f"{init}, {'trained' if train_a else 'fixed'}, seed {seed}")
            records.append(train(init, train_a, seed, options.epochs, data, partial(bar.advance, task)))
    console.print(table(records))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(common | record) + "\n" for record in records))
        console.print(f"written to {out}")
    if default:
        publish(records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
