"""How soon the commands answer."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import environment

ROOT = Path(__file__).parents[2]
LIMIT_S = 0.5


def cpu_seconds(*argv: object) -> float:
    """Of a child. On an idle machine the wall time is the same; beside other tests it says nothing."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *argv], env=environment(), check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("script", ["extract_activations.py", "create_dataset_streams.py", "analyze_activations.py"])
def test_help_comes_within_half_a_second_and_without_jax(script):
    assert min(cpu_seconds(ROOT / script, "--help") for _ in range(3)) < LIMIT_S
    heavy = ("jax", "flax", "transformers", "torch", "gcsfs", "datasets")
    command = f"import sys, {script.removesuffix('.py')} as command; command.build_parser()"
    code = f"{command}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
