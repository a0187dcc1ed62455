"""`stats` killed at random moments, its processes with it, and finished: the bytes of an undisturbed command."""

import os
import random
import time
from pathlib import Path

import pytest

from analysis.stats import PassOptions, StatsRequest, drop_rules, stats
from benchmarks.storage.synthetic_run import SyntheticRun, write_run

SITES = {"mlp": ((0, 2), 64), "residual": ((1,), 48)}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, SyntheticRun(SITES, shard_format="safetensors", dtype="float16"), [[200, 60]] * 24)
    return folder


@pytest.fixture(scope="module")
def expected(out, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("expected") / "stats.npz"
    stats(str(out), StatsRequest(drop=drop_rules(None)), PassOptions(partials="none"), str(path))
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(20 if os.environ.get("FAULTS") == "all" else 2))
def test_killed_at_random_moments_and_finished_gives_the_same_file(forks, out, expected, tmp_path, seed):
    rng = random.Random(seed)
    workers = ["--runner", "threads", "--workers", 2] if seed % 2 else []
    words = ["stats", out, "--output", tmp_path / "stats.npz", "--partials", tmp_path / "partials", *workers]
    for _ in range(3):
        fork = forks.command("analyze_activations.py", *words, cwd=tmp_path)
        time.sleep(rng.uniform(0.1, 1.5))
        fork.kill()
        fork.wait(30)
    done = forks.command("analyze_activations.py", *words, cwd=tmp_path)
    assert done.wait(120) == 0, done.errors
    assert (tmp_path / "stats.npz").read_bytes() == expected
    assert not (tmp_path / "partials").exists()
