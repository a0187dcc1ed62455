"""Simulates a fleet of preemptible workers that claim dataset shards: the share of its time that becomes activations.

The workers follow core/claims/leases.py: they take free dataset shards first, then leases without a heartbeat for the
TTL. While others hold all that is left, they look every heartbeat, or less often in a large dataset. A look lists all
claims. docs/scaling.md lists the other assumptions.
"""

import argparse
import heapq
import itertools
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from absl.flags import argparse_flags

from benchmarks.common.line_chart import Chart, charts_svg
from benchmarks.common.measuring import table
from core.base.command_line import CommandParser, not_negative, positive, run_command
from core.base.errors import UsageError
from core.claims.leases import DEFAULT_HEARTBEAT_S, DEFAULT_TTL_S, poll_interval_s

# Requests are counted in intervals of this length; the fullest one is the peak.
_BUCKET_S = 10.0
# Enough for a smooth curve over the number of dataset shards.
_CHARTED_WORKERS = 100
# A window's shard, its table and its commit record.
WRITES_PER_WINDOW = 3
# Objects that one request of the storage lists.
NAMES_PER_REQUEST = 1000


@dataclass(frozen=True)
class Fleet:
    """What is simulated; times in seconds.

    Attributes:
      window_s: to compute, encode and commit one window.
      start_s: from a new machine to its first claim: boot, load, compile.
      away_s: from a preemption to the replacement machine.
      preemptions_per_hour: of each worker, at random.
      noticed: share of preemptions that leave time to release the lease.
      claim_s: one claim, listing included.
    """

    workers: int
    shards: int
    windows: int
    window_s: float
    start_s: float = 180.0
    away_s: float = 300.0
    preemptions_per_hour: float = 0.0
    noticed: float = 0.5
    claim_s: float = 1.0
    heartbeat_s: float = DEFAULT_HEARTBEAT_S
    ttl_s: float = DEFAULT_TTL_S
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (self.workers, self.shards, self.windows)
        positive_s = (self.window_s, self.heartbeat_s, self.ttl_s)
        others = (self.start_s, self.away_s, self.claim_s, self.preemptions_per_hour)
        if min(counts) < 1 or min(positive_s) <= 0 or min(others) < 0 or not 0 <= self.noticed <= 1:
            raise UsageError(f"a fleet needs workers, shards, windows and positive times: {self}")

    @property
    def work_s(self) -> float:
        """Seconds of work in all windows."""
        return self.shards * self.windows * self.window_s


@dataclass(frozen=True)
class SimulationResult:
    """The result of a simulated run.

    Attributes:
      makespan_s: from the start to the last commit.
      spent_s: worker seconds until then by activity: computed (committed windows), lost (interrupted windows), started,
        claimed, waited, away.
      takeovers: leases taken over; windows: commits.
      peak_reads, peak_writes: requests per second of claims and commits.
    """

    makespan_s: float
    spent_s: dict[str, float]
    windows: int
    preemptions: int
    takeovers: int
    peak_reads: float
    peak_writes: float

    def share(self, what: str) -> float:
        """Share of all worker time."""
        return self.spent_s[what] / sum(self.spent_s.values())


@dataclass
class _Worker:
    """`life` counts its machines: events of earlier ones are ignored. `since` is when its current activity began."""

    life: int = 0
    doing: str = "started"
    since: float = 0.0
    shard: int | None = None
    seen: dict[int, float] = field(default_factory=dict)


class Simulation:
    """One run; `outcome` runs it to the end."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.now = 0.0
        self.done = [0] * fleet.shards
        self._rng = random.Random(fleet.seed)
        self._serial = itertools.count()
        self._events: list[tuple[float, int, str, int, int]] = []
        self._workers = [_Worker() for _ in range(fleet.workers)]
        self._free = list(range(fleet.shards))
        self._held: set[int] = set()
        self._silent: set[int] = set()
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._claim_files = 0
        self._counts: Counter[str] = Counter()
        self._reads: Counter[int] = Counter()
        self._writes: Counter[int] = Counter()

    def outcome(self) -> SimulationResult:
        """Runs until every window is committed."""
        for index in range(self.fleet.workers):
            self._begin(index, "started")
            self._after(self.fleet.start_s, "ready", index)
        wanted = self.fleet.shards * self.fleet.windows
        while self._counts["windows"] < wanted:
            self.now, _, kind, index, life = heapq.heappop(self._events)
            if self._workers[index].life == life:
                getattr(self, f"_{kind}")(index)
        for index in range(self.fleet.workers):
            self._begin(index, "ended")
        return SimulationResult(
            makespan_s=self.now,
            spent_s={what: self._spent[what] for what in ("computed", "lost", "started", "claimed", "waited", "away")},
            windows=self._counts["windows"],
            preemptions=self._counts["preemptions"],
            takeovers=self._counts["takeovers"],
            peak_reads=max(self._reads.values(), default=0) / _BUCKET_S,
            peak_writes=max(self._writes.values(), default=0) / _BUCKET_S,
        )

    def _after(self, seconds: float, kind: str, index: int) -> None:
        life = self._workers[index].life
        heapq.heappush(self._events, (self.now + seconds, next(self._serial), kind, index, life))

    def _begin(self, index: int, doing: str, ended: str | None = None) -> None:
        """The worker changes its activity; the time of the previous one counts as `ended`, or under its own name."""
        worker = self._workers[index]
        # A window in progress counts as computed when it is committed, else as lost.
        self._spent[ended or ("lost" if worker.doing == "computed" else worker.doing)] += self.now - worker.since
        worker.doing, worker.since = doing, self.now

    def _request(self, counter: Counter[int], n: int) -> None:
        counter[int(self.now / _BUCKET_S)] += n

    def _ready(self, index: int) -> None:
        if self.fleet.preemptions_per_hour > 0:
            self._after(self._rng.expovariate(self.fleet.preemptions_per_hour / 3600), "preempted", index)
        self._begin(index, "claimed")
        self._after(self.fleet.claim_s, "look", index)

    def _look(self, index: int) -> None:
        """Claims a free dataset shard, else one whose lease expired, else waits."""
        self._request(self._reads, max(1, math.ceil(self._claim_files / NAMES_PER_REQUEST)))
        expired = self._expired(index)
        if self._free:
            place = self._rng.randrange(len(self._free))
            self._free[place], self._free[-1] = self._free[-1], self._free[place]
            self._work(index, self._free.pop())
        elif expired is not None:
            self._silent.remove(expired)
            self._counts["takeovers"] += 1
            self._work(index, expired)
        elif self._held or self._silent:
            self._begin(index, "waited")
            self._after(poll_interval_s(self.fleet.heartbeat_s, self.fleet.shards), "look", index)

    def _expired(self, index: int) -> int | None:
        """A lease that this worker has seen without a heartbeat for the TTL; each look shows every lease."""
        seen = self._workers[index].seen
        silent_s = {shard: self.now - seen.setdefault(shard, self.now) for shard in sorted(self._silent)}
        return next((shard for shard, seconds in silent_s.items() if seconds >= self.fleet.ttl_s), None)

    def _work(self, index: int, shard: int) -> None:
        # The lease, and its heartbeat, which is replaced.
        self._request(self._writes, 1)
        self._claim_files += 2
        self._held.add(shard)
        self._workers[index].shard = shard
        self._begin(index, "computed")
        self._after(self.fleet.window_s, "committed", index)

    def _committed(self, index: int) -> None:
        shard = self._workers[index].shard
        assert shard is not None
        self.done[shard] += 1
        self._counts["windows"] += 1
        self._request(self._writes, WRITES_PER_WINDOW + int(self.fleet.window_s / self.fleet.heartbeat_s))
        self._begin(index, "computed", ended="computed")
        if self.done[shard] < self.fleet.windows:
            self._after(self.fleet.window_s, "committed", index)
            return
        self._held.remove(shard)
        self._workers[index].shard = None
        self._release()
        self._begin(index, "claimed")
        self._after(self.fleet.claim_s, "look", index)

    def _release(self) -> None:
        self._request(self._writes, 1)
        self._claim_files += 1

    def _preempted(self, index: int) -> None:
        worker = self._workers[index]
        self._counts["preemptions"] += 1
        if worker.shard is not None:
            self._held.remove(worker.shard)
            if self._rng.random() < self.fleet.noticed:
                self._release()
                self._free.append(worker.shard)
            else:
                # A new lease: workers that watched the old one must start over.
                for other in self._workers:
                    other.seen.pop(worker.shard, None)
                self._silent.add(worker.shard)
        worker.shard = None
        worker.seen.clear()
        worker.life += 1
        self._begin(index, "away")
        self._after(self.fleet.away_s, "returned", index)

    def _returned(self, index: int) -> None:
        self._begin(index, "started")
        self._after(self.fleet.start_s, "ready", index)


def simulate(fleet: Fleet) -> SimulationResult:
    """Simulates a fleet to its end."""
    return Simulation(fleet).outcome()


def report(rows: Sequence[tuple[Fleet, SimulationResult]]) -> str:
    """The printed table."""
    header = [
        "workers",
        "preempted/h",
        "shards",
        "hours",
        "computed",
        "lost",
        "starting",
        "claiming",
        "waiting",
        "away",
    ]
    header += ["takeovers", "reads/s", "writes/s"]
    lines = [
        [
            fleet.workers,
            fleet.preemptions_per_hour,
            fleet.shards,
            f"{outcome.makespan_s / 3600:.2f}",
            *(f"{outcome.share(what):.1%}" for what in outcome.spent_s),
            outcome.takeovers,
            f"{outcome.peak_reads:.0f}",
            f"{outcome.peak_writes:.0f}",
        ]
        for fleet, outcome in rows
    ]
    return table(header, lines)


def charts(fleet: Fleet, args: argparse.Namespace) -> list[Chart]:
    """The share of worker time that is committed: by workers, and by dataset shards per worker."""
    by_workers, by_shards = {}, {}
    size = min(max(args.workers), _CHARTED_WORKERS)
    for rate in args.preemptions_per_hour:
        name = f"{rate:g} preemptions/h"
        fleets = [replace(fleet, workers=n, shards=n * args.shards_per_worker) for n in args.workers]
        by_workers[name] = [(one.workers, _computed(replace(one, preemptions_per_hour=rate))) for one in fleets]
        # The same work, cut finer.
        windows = args.shards_per_worker * args.windows_per_shard
        cuts = [n for n in range(1, windows + 1) if windows % n == 0]
        by_shards[name] = [
            (
                n,
                _computed(
                    replace(fleet, workers=size, shards=n * size, windows=windows // n, preemptions_per_hour=rate)
                ),
            )
            for n in cuts
        ]
    return [
        Chart("Worker time that becomes activations", "workers", by_workers, log_x=True),
        Chart(f"The same, {size} workers", "dataset shards per worker", by_shards, log_x=True),
    ]


def _computed(fleet: Fleet) -> float:
    return simulate(fleet).share("computed")


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add(
        "--workers",
        type=positive(int),
        nargs="+",
        default=[1, 10, 100, 1000],
        help="fleet sizes (default 1 10 100 1000)",
    )
    add(
        "--preemptions_per_hour",
        type=not_negative(float),
        nargs="+",
        default=[0, 0.1, 1],
        help="per worker (default 0 0.1 1)",
    )
    add("--shards_per_worker", type=positive(int), default=8, help="dataset shards per worker (default 8)")
    add("--windows_per_shard", type=positive(int), default=12, help="windows per dataset shard (default 12)")
    for name in ("window_s", "start_s", "away_s", "noticed", "claim_s", "heartbeat_s", "ttl_s"):
        default = 60.0 if name == "window_s" else getattr(Fleet, name)
        kind = positive(float) if name in ("window_s", "heartbeat_s", "ttl_s") else not_negative(float)
        add(f"--{name}", type=kind, default=default, help=f"see docs/scaling.md (default {default:g})")
    add("--seed", type=int, default=0, help="random seed (default 0)")
    add("--svg", type=Path, help="draw the table to this file")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Simulates every fleet size at every rate and prints the results."""
    names = ("window_s", "start_s", "away_s", "noticed", "claim_s", "heartbeat_s", "ttl_s", "seed")
    chosen = {name: getattr(args, name) for name in names}
    fleet = Fleet(workers=1, shards=args.shards_per_worker, windows=args.windows_per_shard, **chosen)
    fleets = [
        replace(fleet, workers=n, shards=n * args.shards_per_worker, preemptions_per_hour=rate)
        for rate in args.preemptions_per_hour
        for n in args.workers
    ]
    rows = [(one, simulate(one)) for one in fleets]
    if args.svg:
        args.svg.write_text(charts_svg(charts(fleet, args)))
    if args.json:
        print(json.dumps([{"fleet": asdict(one), "outcome": asdict(outcome)} for one, outcome in rows]))
    else:
        print(report(rows))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
