"""manage_tpus.sh with a stub of gcloud, or with the real one, before a TPU service in a file."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_tpus import FakeTpus

ROOT = Path(__file__).parents[2]
QUICK = ("--retry_delay", "0", "--max_retries", "1", "--gcloud_timeout", "20")


@dataclass
class Fleet:
    """Runs commands against the service; `environment` decides which gcloud they find."""

    tpus: FakeTpus
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, command: str, *flags: str, quick: tuple[str, ...] = QUICK) -> "subprocess.CompletedProcess[str]":
        """Runs `manage_tpus.sh command`, impatient unless `quick` says otherwise."""
        words = [str(ROOT / "scripts/manage_tpus.sh"), command, *quick, *flags]
        return subprocess.run(words, capture_output=True, text=True, env=self.environment, check=False, timeout=120)

    def json(self, command: str, *flags: str) -> list[dict[str, Any]]:
        """The TPUs in what --json prints."""
        return json.loads(self(command, "--json", *flags).stdout)["tpus"]


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
