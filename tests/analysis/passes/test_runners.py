"""Equal bits whatever ran where; one line for one bad part."""

import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from forks import environment
from light_passes import MatrixSum

from analysis.passes import RunnerChoice, run_pass
from analysis.passes.pass_progress import PassProgress
from core.base.errors import RunError, UsageError

PARTS = list(range(13))


@pytest.fixture(scope="module")
def expected() -> bytes:
    return run_pass(MatrixSum(), PARTS)


@pytest.mark.parametrize("block", [1, 2, 8, 16])
def test_blocks_do_not_change_a_bit(expected, block):
    assert run_pass(MatrixSum(), PARTS, block=block) == expected


@pytest.mark.parametrize(("name", "workers"), [("threads", 2), ("processes", 7)])
def test_bits_are_equal_over_workers_also_where_part_0_is_last(expected, name, workers):
    assert run_pass(MatrixSum(slow_s=1.0), PARTS, runner=RunnerChoice(name, workers)) == expected


def test_the_result_is_the_sum(expected):
    exact = np.zeros((4, 300))
    for part in PARTS:
        matrix = np.random.default_rng(part).normal(size=(300, 600))
        exact += np.einsum("ik,jk->ij", matrix[:4], matrix)
    np.testing.assert_allclose(np.frombuffer(expected).reshape(300, 300)[:4], exact, rtol=1e-9, atol=1e-9)


SUM = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from light_passes import MatrixSum
from analysis.passes import run_pass
from threadpoolctl import threadpool_info
before = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
print(max(before), hashlib.sha256(run_pass(MatrixSum(), list(range(13)))).hexdigest())
"""


def test_bits_do_not_depend_on_the_threads_that_blas_would_take(expected):
    """On two cores OpenBLAS cuts these products differently with two threads."""
    found = {}
    for threads in ("1", "2"):
        argv = [sys.executable, "-c", SUM, str(Path(__file__).parents[2])]
        variables = environment(OPENBLAS_NUM_THREADS=threads, OMP_NUM_THREADS=threads)
        done = subprocess.run(argv, env=variables, capture_output=True, text=True, check=True)
        count, found[threads] = done.stdout.split()
        assert count == threads
    assert found["1"] == found["2"]


class Threads(MatrixSum):
    """Its partial is how many threads BLAS has in `map`."""

    def map(self, part):
        from threadpoolctl import threadpool_info

        counts = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
        assert counts
        return np.array(max(counts))

    def merge(self, a, b):
        return np.maximum(a, b)

    def finish(self, partial):
        return int(partial)


@pytest.mark.parametrize("choice", [RunnerChoice("local"), RunnerChoice("threads", 2), RunnerChoice("processes", 2)])
def test_blas_has_one_thread_in_every_runner(choice):
    from threadpoolctl import threadpool_limits

    with threadpool_limits(2, user_api="blas"):
        assert run_pass(Threads(), PARTS[:3], runner=choice) == 1


@pytest.mark.parametrize("name", ["local", "threads", "processes"])
def test_a_bad_part_is_its_own_line_and_ends_the_pass(name, tmp_path):
    choice = RunnerChoice(name, None if name == "local" else 2)
    with pytest.raises(RunError, match=r"^out/part_3 cannot be read: inspect it$"):
        run_pass(MatrixSum(bad=3, log=str(tmp_path)), list(range(200)), runner=choice)
    assert len(MatrixSum(log=str(tmp_path)).mapped()) < 20


class Dying(MatrixSum):
    """A worker that runs out of memory."""

    def map(self, part):
        os.kill(os.getpid(), 9)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(RunError, match=r"a worker process died.*run the same command again to continue"):
        run_pass(Dying(), PARTS[:2], runner=RunnerChoice("processes", 1))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"name": "spark"}, "runner 'spark': expected one of local, threads, processes, ray"),
        ({"name": "local", "workers": 2}, "runner local has one worker"),
        ({"name": "threads", "workers": 0}, "workers is 0"),
        ({"name": "threads", "ray_address": "auto"}, "ray_address needs runner ray"),
    ],
)
def test_choices_that_cannot_be_are_refused(choice, message):
    with pytest.raises(UsageError, match=message):
        RunnerChoice(**choice)


def test_no_parts_and_odd_blocks_are_refused():
    with pytest.raises(ValueError, match="there are no parts"):
        run_pass(MatrixSum(), [])
    with pytest.raises(ValueError, match="power of two"):
        run_pass(MatrixSum(), PARTS, block=3)


def test_progress_has_a_rate_and_the_time_left_and_leaves_out_what_was_stored(monkeypatch):
    monkeypatch.setattr("analysis.passes.pass_progress._LINE_EVERY_S", 0.05)
    lines: list[str] = []
    with PassProgress("stats", 40, 40 << 20, lines.append) as progress:
        progress.add(20, 20 << 20, was_stored=True)
        progress.add(10, 10 << 20, was_stored=False)
        time.sleep(0.3)
    pattern = r"stats: 30/40 parts \(20 found stored\), 30.0 MiB of 40.0 MiB, [\d.]+ MiB/s, \d+ s left"
    assert re.fullmatch(pattern, lines[-1]), lines
    pace, left = re.findall(r"([\d.]+) MiB/s, (\d+) s left", lines[-1])[0]
    assert abs(float(pace) * 0.3 - 10) < 5
    assert abs(int(left) - 10 / float(pace)) <= 1


def test_a_pass_says_nothing_while_it_is_short(caplog):
    with caplog.at_level(logging.INFO):
        run_pass(MatrixSum(), PARTS[:2])
    assert caplog.text == ""
