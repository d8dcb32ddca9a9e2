"""tools/benchmark.py on a CPU: its figures, files and refusals."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import benchmark  # noqa: E402
from bench import layers  # noqa: E402


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    return benchmark.main()


def test_times_models_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, table, picture = tmp_path / "new" / "models.jsonl", tmp_path / "models.csv", tmp_path / "models.png"
    status = run(
        monkeypatch, "test_vmamba", "--device", "cpu", "--batch-size", 1, "--img-size", 32, 64, "--dtype", "float32",
        "--seconds", 0.01, "--out", out, "--csv", table, "--png", picture,
    )  # fmt: skip
    assert status == 0 and "test_vmamba" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["img_size"], r["pass"]) for r in records] == [(s, p) for s in (32, 64) for p in ("infer", "train")]
    for record in records:
        low, median, high = record["ms"]
        assert 0 < low <= median <= high and record["torch"] and "commit" in record
        assert record["images_per_s"] == pytest.approx(1e3 / median, rel=0.01)
    rows = list(csv.DictReader(table.open()))
    assert [row["infer_img_size"] for row in rows] == ["32", "64"] == [row["train_img_size"] for row in rows]
    assert float(rows[0]["infer_samples_per_sec"]) == records[0]["images_per_s"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_model_that_fails_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = benchmark.timm.create_model

    def create(name: str, **options: object) -> object:
        if name == "test_vim":
            raise RuntimeError("no such luck")
        return made(name, **options)

    monkeypatch.setattr(benchmark.timm, "create_model", create)
    common = ("--device", "cpu", "--batch-size", 1, "--img-size", 32, "--seconds", 0.01, "--pass", "infer")
    out = tmp_path / "models.jsonl"
    assert run(monkeypatch, "test_vim", "test_vmamba", *common, "--out", out) == 0
    failed, good = map(json.loads, out.read_text().splitlines())
    assert failed["error"] == "RuntimeError: no such luck" and "ms" not in failed
    assert good["ms"]
    assert run(monkeypatch, "test_vim", *common, "--png", tmp_path / "none.png") == 1
    assert not (tmp_path / "none.png").exists(), "there is nothing to draw"


def test_says_where_one_overtakes_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"batch_size": 8, "mode": "eager", "pass": "infer", "device": "a", "dtype": "b", "torch": "c"}

    def rows(name: str, *rates: float) -> list[dict[str, object]]:
        sizes = (224, 448, 896)
        return [
            common | dict(case=name, img_size=s, images_per_s=r, ms=[1, 1, 1])
            for s, r in zip(sizes, rates, strict=False)
        ]

    records = (
        rows("vmamba_tiny_s1l8", 100, 50, 25) + rows("vit_small_patch16_224", 200, 25, 6) + rows("convnext_tiny", 90)
    )
    (sentence,) = benchmark.crossovers(records)
    assert sentence == (
        "infer, batch 8, eager: vmamba_tiny_s1l8 is behind vit_small_patch16_224 at 224 px, overtakes it at 317 px, "
        "4.17 times its rate at 896 px"
    )
    path, picture = tmp_path / "records.jsonl", tmp_path / "accuracy.png"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert run(monkeypatch, "--draw", path, "--accuracy-png", picture, "--device", "cpu") == 0
    assert sentence in capsys.readouterr().out and picture.read_bytes().startswith(b"\x89PNG")
    assert benchmark.published_top1("vmamba_tiny_s1l8") == 82.6 and benchmark.published_top1("test_vim") is None


def test_times_a_mixer_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "layers.jsonl"
    monkeypatch.setitem(layers.STAGES, "ss2d_stage4", layers.STAGES["ss2d_stage4"]._replace(channels=16, side=3))
    few = ["--stage", "ss2d_stage4", "--mode", "eager", "--batch-size", "2", "--seconds", "0.01"]
    common = ["layers.py", "--device", "cpu", "--dtype", "float32", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", common + few)
    assert layers.main() == 0 and "of the published code's" in capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["pass"] for record in records] == ["fwd", "fwdbwd"] and records[0]["rel_rms"] < 1e-4
    monkeypatch.setattr(layers, "BOUND", 1e-9)
    with pytest.raises(ArithmeticError, match="more than 1e-09"):
        layers.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vmamba_tinny"], "no model is named vmamba_tinny"),
        (["test_vmamba", "--device", "cpu", "--mode", "graph"], "graph needs a CUDA device"),
        (["test_vmamba", "--device", "cpu", "--kernels", "no_kernels.txt"], "--kernels needs a CUDA device"),
        (["test_vmamba", "--compile-mode", "reduce-overhead"], "--compile-mode is of --mode compile"),
        ([], "name models to time, or --draw records"),
    ],
)
def test_says_what_it_can_not_do(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, *arguments)
    assert message in capsys.readouterr().err
