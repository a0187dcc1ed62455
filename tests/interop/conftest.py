"""Environments of the tools that read our exports: `make test-interop` installs them and says where they are."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def read_with(tmp_path) -> Callable[..., dict[str, np.ndarray]]:
    """Runs tests/interop/readers/<name>.py in the environment of a tool; returns the arrays that it has loaded."""

    def read(environment: str, script: str, *arguments: object) -> dict[str, np.ndarray]:
        if "INTEROP" not in os.environ:
            pytest.skip("no environments of other tools: make test-interop")
        python = Path(os.environ["INTEROP"]).absolute() / environment / "bin/python"
        found = tmp_path / "found.npz"
        command = [python, "-W", "ignore", ROOT / f"tests/interop/readers/{script}.py", found, *arguments]
        variables = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=variables, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        with np.load(found) as arrays:
            return dict(arrays)

    return read
