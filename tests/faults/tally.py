"""How often each fault was tried: every test notes it at its end, and `make test-faults` prints the sums.

It fails when one was tried less often than it should be, unless tests that were skipped say why.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from core.base.fault_points import POINTS

# Each row, and how often the whole suite tries it; None: as often as there are places, files or fields.
KILLS_AT_POINTS = "SIGKILL at an instrumented point"
KILLS_AT_RANDOM = "SIGKILL at a random moment, 4 processes"
KILLS_IN_A_BUCKET = "the same in a bucket"
ZOMBIES = "SIGSTOP past the TTL, then SIGCONT"
RACES = "race of 32 claimants for one shard, {}"
LOST = "lost acknowledgement, creations hit"
STORAGE = "run with 429, 503 or reset on 30% of the calls"
FULL_DISK = "disk full while a run writes"
CLOCKS = "run with wall clocks an hour off, or jumping"
SCALING = "workers 1, 8, 3, 1 in one run"
DAMAGE = "byte flipped, file cut or gone"
REFUSED = "another run in the same folder"
PREEMPTION = "SIGTERM, and hung workers"
HOSTS = "slice of hosts: death, SIGTERM or error of one"
STEPS = "state machine: sequences of up to 50 steps"
MUTATIONS = "safeguard taken out, which the suite must miss"
WANTED: dict[str, int | None] = {
    KILLS_AT_POINTS: 3 * len(POINTS),
    KILLS_AT_RANDOM: 200,
    KILLS_IN_A_BUCKET: 50,
    ZOMBIES: 50,
    RACES.format("disk"): 1000,
    RACES.format("memory"): 1000,
    RACES.format("bucket"): 1000,
    LOST: None,
    STORAGE: 20,
    FULL_DISK: 5,
    CLOCKS: 10,
    SCALING: 5,
    DAMAGE: None,
    REFUSED: None,
    PREEMPTION: None,
    HOSTS: None,
    STEPS: 1000,
    MUTATIONS: None,
}
# Files each test of which tries one fault of the row.
BY_FILE = {"test_preemption.py": PREEMPTION, "test_mutations.py": MUTATIONS, "test_pod_slice.py": HOSTS}
PROPERTY = "tried"
# The row that a test tries which is skipped.
SKIPPED = "skipped"


class Tally(Protocol):
    """Notes that a row's fault was tried so many times, each with the expected result."""

    def __call__(self, row: str, times: int = 1) -> None: ...


@dataclass(frozen=True)
class Tried:
    """One note of one test, and how long the test took."""

    row: str
    times: int
    seconds: float


def tried_in(reports: Iterable[Any]) -> list[Tried]:
    """The notes in pytest's reports of tests that passed."""
    tried = []
    for report in reports:
        file = report.nodeid.partition("::")[0].rpartition("/")[2]
        times = Counter[str]([BY_FILE[file]] if file in BY_FILE else [])
        for name, value in report.user_properties:
            if name == PROPERTY:
                times[value[0]] += value[1]
        tried += [Tried(row, number, report.duration) for row, number in times.items()]
    return tried


def reasons_in(reports: Iterable[Any]) -> dict[str, str]:
    """By row, why tests of it were skipped, in pytest's reports of tests that were."""
    return {
        row: report.longrepr[2].removeprefix("Skipped: ")
        for report in reports
        for name, row in getattr(report, "user_properties", ())
        if name == SKIPPED
    }


def missed(tried: Sequence[Tried], reasons: Mapping[str, str]) -> list[str]:
    """The rows that the whole suite tried less often than it should have, with no reason given."""
    times = _times(tried)
    return [row for row, wanted in WANTED.items() if times[row] < (wanted or 1) and row not in reasons]


def table(tried: Sequence[Tried], reasons: Mapping[str, str], is_whole: bool) -> list[str]:
    """How often, and the seconds of its tests; of the whole suite also which rows fell short."""
    times, seconds = _times(tried), Counter[str]()
    for each in tried:
        seconds[each.row] += each.seconds
    notes = {row: f"  SKIPPED: {reason}" for row, reason in reasons.items()}
    if is_whole:
        notes |= dict.fromkeys(missed(tried, reasons), "  MISSED")
    lines = []
    for row, wanted in WANTED.items():
        if is_whole or times[row] or row in notes:
            of = f" of {wanted}" if wanted and is_whole else ""
            lines.append(f"{row:<50} {times[row]:>6}{of:<8} {seconds[row]:7.1f} s{notes.get(row, '')}")
    return lines


def _times(tried: Sequence[Tried]) -> Counter[str]:
    times = Counter[str]()
    for each in tried:
        times[each.row] += each.times
    return times
