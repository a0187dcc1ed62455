"""`verify` over several folders of one stream: each line must be in exactly one of them."""

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import cache_dir, token_lines, write_jsonl, write_model

from analysis.verification.stream_shares import share_faults
from analysis.verification.verify import verify
from core.commit.identity import StreamIdentity
from core.run.config import RunConfig
from core.run.runner import run

IDENTITY = {"name": "s.jsonl", "bytes": 1, "crc32c": "00000000"}


@pytest.fixture(scope="module")
def shares(tmp_path_factory):
    """The folder of any share of one stream, each made by its own run."""
    home = tmp_path_factory.mktemp("shares")
    model = write_model(home / "model", tokenizer=False)
    stream = write_jsonl(home / "s.jsonl", token_lines(7, longest=30))

    def share(machine: int, total: int, max_tasks: int | None = None) -> Path:
        out = home / f"{machine}_{total}_{max_tasks}"
        if not out.exists():
            run(
                RunConfig(
                    model_path=str(model),
                    dataset_path=str(stream),
                    output_dir=str(out),
                    checkpoint_dir=str(home / "ck"),
                    compilation_cache_dir=cache_dir(),
                    max_seq_length=32,
                    machine_id=machine,
                    total_machines=total,
                    max_tasks=max_tasks,
                )
            )
        return out

    return share


@pytest.fixture
def together(shares, tmp_path):
    """An output in which worker i has the i-th of the shares."""

    def combine(*parts: tuple) -> Path:
        out = tmp_path / "out"
        out.mkdir()
        for worker, part in enumerate(parts):
            shutil.copy(shares(*part) / "run.json", out)
            shutil.copytree(shares(*part) / "tpu_0", out / f"tpu_{worker}")
        return out

    return combine


def test_all_shares_of_a_stream_are_well(together):
    report = verify(str(together((2, 3), (0, 3), (1, 3))))
    assert report.ok, report.lines()
    assert sum(folder.samples for folder in report.folders) == 7


def test_the_same_stream_under_two_workers_is_a_problem_that_names_both(together):
    report = verify(str(together((0, 1), (0, 1))))
    assert not report.ok
    (problem,) = report.problems
    assert "tpu_0 and tpu_1" in problem
    assert "stored twice" in problem
    assert report.to_json()["problems"] == (problem,)
    assert f"PROBLEM: {problem}" in report.lines()
    assert not verify(report.url, allow_unfinished=True).ok


def test_a_missing_share_is_a_problem_or_a_note(together):
    out = together((0, 3), (1, 3))
    report = verify(str(out))
    (problem,) = report.problems
    assert "machine 2 of 3" in problem
    assert not report.ok
    allowed = verify(str(out), allow_unfinished=True)
    assert allowed.ok
    assert allowed.warnings == (problem,)
    assert f"note: {problem}" in allowed.lines()


def test_one_folder_on_the_command_line_is_looked_at_alone(together):
    assert verify(f"{together((0, 3))}/tpu_0").ok


def test_shares_of_different_cuts_are_a_problem(together):
    report = verify(str(together((0, 3), (0, 2))))
    (problem,) = report.problems
    assert "machine 0 of 3" in problem
    assert "machine 0 of 2" in problem


def test_shares_with_different_limits_are_a_problem(together):
    report = verify(str(together((0, 1), (0, 1, 3))))
    assert any("different --max_tasks" in problem and "3 tasks" in problem for problem in report.problems)
    assert any("stored twice" in problem for problem in report.problems)


def test_different_streams_and_shards_of_a_dataset_are_no_shares_of_each_other():
    streams = {
        "tpu_0": StreamIdentity(IDENTITY, 0, 1, None),
        "tpu_1": StreamIdentity(IDENTITY | {"name": "t.jsonl"}, 0, 1, None),
        "shard_001": StreamIdentity(IDENTITY, 0, 1, None, first_position=6),
    }
    faults = share_faults(streams)
    assert (faults.problems, faults.unfinished) == ((), ())


def test_a_great_many_missing_shares_are_one_short_line():
    (line,) = share_faults({"tpu_0": StreamIdentity(IDENTITY, 1, 10**12, None)}).unfinished
    assert "machine 0, 2, 3" in line
    assert "and 999999999991 more" in line
    assert len(line) < 300


@given(st.lists(st.integers(1, 4).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))), min_size=1))
def test_shares_are_well_exactly_when_each_line_is_held_once(cuts):
    """The oracle counts how often each of 12 lines, a multiple of every number of machines, is taken."""
    taken = [line for machine, total in cuts for line in range(12) if line % total == machine]
    streams = {f"tpu_{i}": StreamIdentity(IDENTITY, machine, total, None) for i, (machine, total) in enumerate(cuts)}
    faults = share_faults(streams)
    is_mixed = len({total for _, total in cuts}) > 1
    assert (not faults.problems and not faults.unfinished) == (sorted(taken) == list(range(12)) and not is_mixed)
