"""The sums at the end say what was tried, and the whole suite fails where something was not."""

import os
import subprocess
import sys
from pathlib import Path

import tally
from tally import FULL_DISK, HOSTS, PREEMPTION, WANTED, Tried

ALL = [Tried(row, wanted or 1, 2.0) for row, wanted in WANTED.items()]


def but(row: str, times: int) -> list[Tried]:
    return [each if each.row != row else Tried(row, times, 2.0) for each in ALL]


def noted(lines: list[str], row: str) -> str:
    (line,) = [line for line in lines if line.startswith(row)]
    return line.partition(" s")[2].strip()


def test_a_row_that_was_tried_too_seldom_is_missed_unless_a_skipped_test_says_why():
    assert tally.missed(ALL, {}) == []
    short = but(FULL_DISK, 4)
    assert tally.missed(short, {}) == [FULL_DISK]
    assert noted(tally.table(short, {}, True), FULL_DISK) == "MISSED"
    assert tally.missed(short, {FULL_DISK: "needs root"}) == []
    assert noted(tally.table(short, {FULL_DISK: "needs root"}, True), FULL_DISK) == "SKIPPED: needs root"
    # Rows without a count are to be tried at all.
    assert tally.missed(but(HOSTS, 0), {}) == [HOSTS]


def test_a_selection_shows_what_was_tried_and_misses_nothing():
    (line,) = tally.table([Tried(PREEMPTION, 3, 1.0)], {}, False)
    assert "MISSED" not in line


SUITE = """
def test_a_fault(record_property):
    record_property("tried", ("disk full while a run writes", 1))
"""


def test_the_whole_suite_fails_where_a_row_is_missed(tmp_path):
    """The real sums and their end, over a suite of one fault."""
    folder = tmp_path / "faults"
    folder.mkdir()
    for name in ("conftest.py", "tally.py"):
        (folder / name).symlink_to(Path(__file__).with_name(name))
    (folder / "test_one.py").write_text(SUITE)
    slices = tmp_path / "runs/test_pod_slice.py"
    slices.parent.mkdir()
    slices.write_text("")
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, [folder, here, here.parent, here.parents[1], *sys.path]))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        "--import-mode=importlib",
    ]

    def ended(faults: str, *arguments: object) -> tuple[int, str]:
        environment = os.environ | {"FAULTS": faults, "PYTHONPATH": paths}
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)
        return done.returncode, done.stdout

    whole = (folder, slices)
    code, printed = ended("all", *whole)
    assert code == 1, printed
    assert "1 of 5" in printed
    assert "MISSED" in printed
    assert ended("", *whole)[0] == ended("all", folder)[0] == 0
