"""manage_tpus.sh with a stub of gcloud, or with the real one, before a TPU service in a file."""

import os
import sys
from pathlib import Path

import pytest
from fake_tpus import FakeTpus
from fleet_commands import Fleet


@pytest.fixture
def tpus(tmp_path: Path) -> FakeTpus:
    return FakeTpus(tmp_path / "tpus.json")


@pytest.fixture
def fleet(tpus: FakeTpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """Commands find the stub first in PATH; so does what a test runs in its own process."""
    folder = tmp_path / "bin"
    folder.mkdir()
    stub = Path(__file__).with_name("gcloud_stub.py")
    (folder / "gcloud").write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{stub}" "$@"\n')
    (folder / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_TPUS", str(tpus.path))
    monkeypatch.setenv("FAKE_HOSTS", str(tmp_path / "hosts"))
    monkeypatch.setenv("FAKE_VM_BIN", str(tmp_path / "vm_bin"))
    monkeypatch.setenv("PYTHON", sys.executable)
    return Fleet(tpus, dict(os.environ))
