"""manage_tpus.sh as a person calls it."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
