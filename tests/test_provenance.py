"""Records say where they come from, also where there is no git to ask."""

from __future__ import annotations

import logging
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from vision_mamba import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of one commit with files a and b, which stands for ours."""
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("1")
    person = {f"GIT_{role}_{what}": "nobody" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    for command in ("init -q", "add a b", "commit -qm first"):
        subprocess.run(["git", *command.split()], cwd=tmp_path, env=os.environ | person, check=True)
    return tmp_path


def test_commit_and_changes_to_what_is_covered(checkout: Path) -> None:
    clean = provenance.provenance("cpu")
    assert re.fullmatch("[0-9a-f]{40}", clean["commit"]) and clean["dirty"] is False
    (checkout / "new").write_text("1")
    assert provenance.provenance("cpu")["dirty"] is False
    (checkout / "b").write_text("2")
    assert provenance.provenance("cpu")["dirty"] is True
    assert provenance.provenance("cpu", "a")["dirty"] is False
    assert provenance.provenance("cpu", "a", "b")["dirty"] is True


def test_without_git_the_environment_names_the_commit_or_nothing_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(provenance.COMMIT_VARIABLE, raising=False)
    monkeypatch.setattr(provenance, "_ROOT", tmp_path)
    with caplog.at_level(logging.WARNING, logger="vision_mamba"):
        record = provenance.provenance("cpu")
    assert record["commit"] is None and record["dirty"] is None
    assert "set VISION_MAMBA_COMMIT" in caplog.text
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    assert provenance.provenance("cpu")["commit"] == "abc123"


def test_a_copy_without_git_is_compared_with_the_files_of_its_commit(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    listed = subprocess.run(["git", "ls-tree", "-r", "HEAD"], cwd=checkout, capture_output=True, check=True).stdout
    tree = tmp_path_factory.mktemp("listed") / "tree"
    tree.write_bytes(listed)
    monkeypatch.setenv(provenance.COMMIT_VARIABLE, "abc123")
    assert provenance.provenance("cpu")["dirty"] is None
    monkeypatch.setenv(provenance.TREE_VARIABLE, str(tree))
    assert provenance.provenance("cpu")["dirty"] is False
    (checkout / "b").write_text("2")
    assert provenance.provenance("cpu")["dirty"] is True and provenance.provenance("cpu", "a")["dirty"] is False
    (checkout / "a").unlink()
    assert provenance.provenance("cpu", "a")["dirty"] is True


def test_a_folder_within_another_repository_is_not_taken_for_it(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / "copy").mkdir()
    monkeypatch.setattr(provenance, "_ROOT", checkout / "copy")
    assert provenance.provenance("cpu")["commit"] is None


def test_the_machine() -> None:
    record = provenance.provenance("cpu")
    assert record["device"] and record["torch"] == torch.__version__ and record["threads"] == torch.get_num_threads()
    assert provenance.provenance("meta")["device"] == "meta" and "threads" not in provenance.provenance("meta")
