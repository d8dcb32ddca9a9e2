"""Write the tables of README.md anew from the records in results/.

    python tools/tables.py

Each table stands between a mark that names its record and an end; what is outside of them is left alone. Of several
records of one figure the last counts. What other authors have published, or we have measured of their code, stands
here with its source, since no command of this repository can bring it forth.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
README = ROOT / "README.md"
END = "<!-- end of table -->\n"
#: Images a second, inferring and training, as published by the authors: on an A100, 128 images of 224 px a step.
PUBLISHED_SPEEDS = {
    "vmamba_tiny_v0": (638, 195),
    "vmamba_base_s1l20": (827, 313),
    "mambavision_tiny": (6298, None),
}
#: The published code on an H200, bfloat16, 128 images of 224 px, eager: ms of inference and of a training step, GiB of
#: the latter. Measured by the makers of this library when they set out; no record of it is kept here.
PUBLISHED_CODE = {
    "vmamba_tiny_s1l8": (40.5, 108, 12.2),
    "vmamba_base_s1l20": (74.1, 208, 24.2),
    "vim_tiny_patch16_224": (29.2, 117, 4.9),
    "vim_small_patch16_224": (55.1, 216, 9.1),
}
PASSES = ("infer", "train")
#: Other kernels than ours in records of scans.
PEERS = {"mamba_ssm": "mamba_ssm", "vmamba_oflex": "VMamba"}

Record = dict[str, Any]
Records = Iterable[Record]


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _rows(titles: Iterable[str], aligned: str, rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown; of `aligned`, l and r, one letter a column."""
    rule = "|".join({"l": "---", "r": "--:"}[side] for side in aligned)
    lines = [" | ".join(titles), *(" | ".join(cell or "-" for cell in row) for row in rows)]
    first, *others = (f"| {line} |\n" for line in lines)
    return "".join([first, f"|{rule}|\n", *others])


def models(records: Records) -> str:
    """The registered models, families apart and each from small to large."""
    differences = measured()
    sizes = ("parameters, M", "GMACs", "in scans", "as published", "input")
    titles = ("model", *sizes, "top-1", "weights", "licence", "parity")
    rows = (
        (
            f"`{r['case']}`",
            f"{r['params'] / 1e6:.1f}",
            f"{r['flops'] / 2e9:.2f}",
            f"{r['scan_flops'] / r['flops']:.0%}",
            f"{r['gmacs_as_published']:.2f} ({r['published_gmacs']:.1f})" if r["published_gmacs"] else "",
            " x ".join(map(str, r["input"][1:])),
            ", ".join(_notes(r, "top-1 ")),
            ", ".join(f"[{card['tag']}]({card['weights']})" for card in r["cards"] if card["weights"]),
            ", ".join((r["license"], *_notes(r, "licence: "))),
            " / ".join(f"{off:.0e}" for off in differences.get(r["case"], ())),
        )
        for r in sorted(records, key=lambda r: (r["case"].split("_")[0], r["flops"]))
    )
    return _rows(titles, "lrrrrlllll", rows)


def _notes(record: Record, kind: str) -> list[str]:
    """What the notes of a model's cards say of that kind."""
    notes = (note for card in record["cards"] for note in card["published"])
    return [note.removeprefix(kind) for note in notes if note.startswith(kind)]


def measured() -> dict[str, tuple[float, float]]:
    """Model -> relative difference of its logits and of its gradients from the published ones, where measured."""
    found = read(RESULTS / "parity.jsonl")
    return {record["case"]: (record["relative_difference"], record["gradient_difference"]) for record in found}


def _newest(records: Records, *keys: str) -> dict[tuple[Any, ...], Record]:
    return {tuple(record[key] for key in keys): record for record in records}


def families(records: Records) -> str:
    """What `tools/benchmark.py` measured of one or two models of each family, beside what its authors published."""
    found: dict[str, dict[tuple[str, str], Record]] = {}
    for r in records:
        found.setdefault(r["case"], {})[r["pass"], r["mode"]] = r
    titles = ("model", "inference, images/s", "training, images/s", "its memory, GiB", "published, A100, images/s")

    def rows() -> Iterable[Iterable[str]]:
        for name, runs in sorted(found.items()):
            theirs = [f"{speed:,}" for speed in PUBLISHED_SPEEDS.get(name, ()) if speed]
            ours = (f"{runs[which, 'graph']['images_per_s']:,.0f}" for which in ("infer", "train"))
            yield f"`{name}`", *ours, f"{runs['train', 'eager']['peak_gib']:.1f}", " / ".join(theirs)

    return _rows(titles, "lrrrr", rows())


def whole_models(records: Records) -> str:
    """The models of both main families beside those of timm, 128 images of 224 px, and the published code's figures."""
    usual = (r for r in records if (r["batch_size"], r["img_size"]) == (128, 224) and not r.get("checkpointing"))
    found = _newest(usual, "case", "pass", "mode")
    titles = ("model", "inference, ms", "compiled", "eager", "training step, ms", "compiled", "eager")

    def rows() -> Iterable[Iterable[str]]:
        for name in dict.fromkeys(case for case, _, _ in found):
            runs = (found.get((name, which, mode)) for which in PASSES for mode in ("graph", "compile", "eager"))
            memory, theirs = found.get((name, "train", "eager")), PUBLISHED_CODE.get(name, ())
            yield (
                f"`{name}`",
                *(f"{run['ms'][1]:.1f}" if run else "" for run in runs),
                f"{memory['peak_gib']:.1f}" if memory else "",
                " / ".join(f"{figure:g}" for figure in theirs),
            )

    return _rows((*titles, "its memory, GiB", "published code: ms, ms, GiB"), "lrrrrrrrr", rows())


def resolutions(records: Records) -> str:
    """The same by the side of the image, inference and training step in ms."""
    found = _newest((r for r in records if r["mode"] == "graph"), "case", "pass", "img_size")
    sides = sorted({side for _, _, side in found})

    def rows() -> Iterable[Iterable[str]]:
        for name in dict.fromkeys(case for case, _, _ in found):
            both = ([found[name, which, side]["ms"][1] for which in PASSES] for side in sides)
            yield f"`{name}`", *(" / ".join(f"{ms:.1f}" for ms in pair) for pair in both)

    return _rows(("model", *(f"{side} px" for side in sides)), "l" + "r" * len(sides), rows())


def _scan(shape: Mapping[str, Any]) -> str:
    """The shape of a scan in words."""
    tokens = shape["height"] * shape["width"]
    sizes = f"B {shape['batch']}, L {tokens:,}, K {shape['routes']}, D {shape['channels']}, N {shape['states']}"
    return f"{sizes}, R {shape['rank']}" if shape["rank"] else sizes


def scans(records: Records) -> str:
    """Scans of published models in bfloat16 on CUDA, from large batches to small, beside the fastest other kernel."""
    usual = (r for r in records if r["dtype"] == "bfloat16" and not r.get("lean"))
    found = _newest(usual, "case", "backend", "pass")
    titles = ("scan", "forward, ms", "other, ms", "times", "backward, ms", "other, ms", "times", "both, MiB", "other")

    def rows() -> Iterable[Iterable[str]]:
        batches = {case: r["shape"]["batch"] for (case, _, _), r in found.items()}
        for case in sorted(batches, key=lambda case: (-batches[case], case)):
            peers = [name for name in PEERS if (case, name, "bwd") in found and (case, name, "fwd") in found]
            if case.startswith("grow") or not peers or (case, "cuda", "bwd") not in found:
                continue
            cells = [f"`{case}`: {_scan(found[case, 'cuda', 'fwd']['shape'])}"]
            for which in ("fwd", "bwd"):
                ours = found[case, "cuda", which]["ms"][1]
                other = min(peers, key=lambda name: found[case, name, which]["ms"][1])
                theirs = found[case, other, which]["ms"][1]
                cells += [f"{ours:.3f}", f"{theirs:.3f} ({PEERS[other]})", f"{theirs / ours:.1f}x"]
            most = {name: found[case, name, "fwdbwd"]["peak_mib"] for name in ("cuda", *peers)}
            yield *cells, f"{most.pop('cuda'):,.0f}", f"{min(most.values()):,.0f}"

    return _rows(titles, "lrrrrrrrr", rows())


def dual_scans(records: Records) -> str:
    """Scans by state-space duality beside mamba_ssm's."""
    found = _newest(records, "case", "backend", "pass")
    titles = ("scan", "forward, ms", "mamba_ssm, ms", "times", "backward, ms", "mamba_ssm, ms", "times")

    def rows() -> Iterable[Iterable[str]]:
        for case in dict.fromkeys(case for case, backend, _ in found if backend == "mamba_ssm"):
            s = found[case, "triton", "fwd"]["shape"]
            sizes = f"B {s['batch']}, L {s['tokens']:,}, H {s['heads']}, P {s['channels']}, N {s['states']}"
            cells = [sizes]
            for which in ("fwd", "bwd"):
                ours, theirs = (found[case, name, which]["ms"][1] for name in ("triton", "mamba_ssm"))
                cells += [f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.1f}x"]
            yield cells

    return _rows(titles, "lrrrrrr", rows())


def exports(records: Records) -> str:
    """How far the files of small models of every family are from the models, in each format."""
    small = [r for r in records if "vary" in r and r["difference"] is not None and not r["int8"]]
    found = _newest(small, "case", "format", "scan", "vary")
    kinds = sorted({(form, scan, vary) for _, form, scan, vary in found}, key=lambda kind: (kind[2] != "size", kind))
    titles = ("model", *(f"`{form}`: any {'batch' if vary == 'batch' else 'batch, size'}" for form, _, vary in kinds))

    def rows() -> Iterable[Iterable[str]]:
        for case in dict.fromkeys(case for case, *_ in found):
            cells = (found.get((case, *kind)) for kind in kinds)
            yield f"`{case.removeprefix('export_')}`", *(f"{r['difference']:.0e}" if r else "" for r in cells)

    return _rows(titles, "l" + "r" * len(kinds), rows())


#: Record -> the table that README.md has of it.
TABLES: dict[str, Callable[[Records], str]] = {
    "models.jsonl": models,
    "models_gpu.jsonl": whole_models,
    "resolutions_gpu.jsonl": resolutions,
    "families_gpu.jsonl": families,
    "cuda_scan.jsonl": scans,
    "ssd.jsonl": dual_scans,
    "export.jsonl": exports,
}


def put(text: str, rows: str, name: str) -> str:
    """A text with the table between the mark of a record and the next end replaced.

    Raises: ValueError if the text has no such mark.
    """
    begin = f"<!-- table of results/{name} -->\n"
    before, found, behind = text.partition(begin)
    _, end, after = behind.partition(END)
    if not found or not end:
        raise ValueError(
            f"tables: {README.name} must have a line {begin.strip()!r}, and one {END.strip()!r} behind it."
        )
    return "".join((before, begin, rows, end, after))


def written(text: str) -> str:
    """A text with all tables as the records have them."""
    for name, table in TABLES.items():
        text = put(text, table(read(RESULTS / name)), name)
    return text


def main(words: Sequence[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=formatter).parse_args(words)
    README.write_text(written(README.read_text()))
    sys.stdout.write(f"{README.name} is up to date\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
