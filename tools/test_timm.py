"""Run timm's own model tests, unmodified, on every model of this package.

    python tools/test_timm.py                        # all models; one and a half hours on 2 cores
    python tools/test_timm.py --models 'test_*'      # the small ones
    python tools/test_timm.py --models 'vim_*' --record results/timm_contract.jsonl
    python tools/test_timm.py --weights              # with the tests that download the published weights
    python tools/test_timm.py -m torchscript -n 2    # anything else goes to pytest too

The tests are those of exactly the timm version that is installed. They come with its source distribution, which is
fetched from the package index once and kept in .cache/. A record is a line a model, which tests it passed and which
not; lines of models that did not run stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from vision_mamba.provenance import provenance  # noqa: E402

COVERED = ("vision_mamba", "csrc", "tests/timm_ext.py", "tests/registered.py")  # what a record depends on
NEEDED = ("tests/", "pyproject.toml")  # not timm/ itself, which would hide the installed one


def fetch_sdist(version: str, folder: Path) -> Path:
    """Download timm's source distribution into a folder, unless it lies there.

    Raises: SystemExit with what to do if it cannot be had.
    """
    sdist = folder / f"timm-{version}.tar.gz"
    if sdist.is_file():
        return sdist
    with tempfile.TemporaryDirectory() as fresh:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries=1", "--timeout=20"]
        command += ["--no-deps", "--no-binary=timm", f"--dest={fresh}", f"timm=={version}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        found = Path(fresh) / sdist.name
        if done.returncode or not found.is_file():
            last = (done.stdout.strip().splitlines() or ["no output"])[-1]
            raise SystemExit(
                f"test_timm: the tests of timm {version} come with its source distribution, and pip could not fetch "
                f"that ({last}). Run this once with the package index in reach, or put {sdist.name} into {folder}/."
            )
        folder.mkdir(parents=True, exist_ok=True)
        _place(found.read_bytes(), sdist)
    return sdist


def _place(content: bytes, path: Path) -> None:
    """Write a file whole or not at all, also when two runs do it at once."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)


def read_tests(sdist: Path) -> dict[str, bytes]:
    """Path -> content of the tests and their pytest settings in the archive.

    Raises: SystemExit if the archive is damaged or holds no tests.
    """
    top = sdist.name.removesuffix(".tar.gz")
    wanted = tuple(f"{top}/{name}" for name in NEEDED)
    files = {}
    try:
        with tarfile.open(sdist) as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(wanted):
                    content = archive.extractfile(member)
                    assert content is not None, member.name
                    files[member.name] = content.read()
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise SystemExit(f"test_timm: {sdist} is damaged ({error}); delete it and run again.") from error
    if f"{top}/tests/test_models.py" not in files:
        raise SystemExit(f"test_timm: {sdist} holds no tests/test_models.py; delete it and run again.")
    return files


def run(models: str, options: list[str], cache: Path) -> int:
    """Run the tests in a process of their own; returns pytest's exit status."""
    version = importlib.metadata.version("timm")
    for name, content in read_tests(fetch_sdist(version, cache)).items():
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        _place(content, cache / name)
    path = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}
    # timm leaves tests out on its own CI machines, whose memory is small; here they all run.
    environment.pop("GITHUB_ACTIONS", None)
    environment.setdefault("TIMEOUT", "1800")  # seconds a test, timm's own are meant for faster machines
    command = [sys.executable, "-m", "pytest", "-p", "timm_ext", "-p", "no:cacheprovider", "-p", "no:warnings", "-q"]
    command += [f"--models={models}", "tests/test_models.py", *options]
    return subprocess.run(command, cwd=cache / f"timm-{version}", env=environment).returncode


def outcomes(report: Path) -> dict[str, dict[str, Any]]:
    """Model -> the tests that it passed, skipped with the reason or failed, and the seconds that they took.

    Args:
        report: of pytest, in JUnit's format.
    """
    found: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        test, _, parameters = case.attrib["name"].removesuffix("]").partition("[")
        model = parameters.rpartition("-")[2].partition(".")[0]  # without the batch size and the card's tag
        record = found.setdefault(model, {"passed": set(), "skipped": {}, "failed": {}, "seconds": 0.0})
        record["seconds"] += float(case.attrib["time"])
        told = {kind.tag: kind.get("message", "").partition("\n")[0] for kind in case}
        if "failure" in told or "error" in told:
            record["failed"][test] = told.get("failure") or told.get("error")
        elif "skipped" in told:
            record["skipped"][test] = told["skipped"]
        else:
            record["passed"].add(test)
    for record in found.values():
        left = record["failed"].keys() | record["skipped"].keys()
        record |= {"passed": sorted(record["passed"] - left), "seconds": round(record["seconds"], 1)}
    return found


def write(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Put what was found into the file of the records."""
    source = provenance("cpu", *COVERED) | {"timm": importlib.metadata.version("timm")}
    lines = path.read_text().splitlines() if path.is_file() else []
    records = {record["case"]: record for record in map(json.loads, lines)}
    records |= {name: source | {"case": name} | record for name, record in found.items()}
    path.write_text("".join(json.dumps(records[name]) + "\n" for name in sorted(records)))


def run_and_record(models: str, options: list[str], cache: Path, path: Path) -> int:
    """Run the tests and put on record what came out; returns pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        status = run(models, [*options, f"--junitxml={report}"], cache)
        if report.is_file():
            write(path, outcomes(report))
    return status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="*", help="pattern of model names (default: every model)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where timm's tests are kept")
    parser.add_argument("--record", type=Path, help="file of records to put the outcome into")
    arguments, options = parser.parse_known_args()
    cache = arguments.cache.resolve()
    if arguments.record:
        return run_and_record(arguments.models, options, cache, arguments.record)
    return run(arguments.models, options, cache)


if __name__ == "__main__":
    sys.exit(main())
