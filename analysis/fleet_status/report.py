"""The status report of a fleet: shards, workers, progress, throughput and time left."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Literal

from core.base.redaction import printable

State = Literal["finished", "running", "abandoned", "waiting", "poisoned", "unfinished"]

# Throughput is measured over the last minutes, or over this many commits when they are further apart.
_RATE_OVER_S = 600.0
_RATE_OVER_COMMITS = 8


@dataclass(frozen=True)
class Commit:
    """One committed window: its time, by the storage's clock, and its counts."""

    at: float
    samples: int
    tokens: int


@dataclass(frozen=True)
class ShardStatus:
    """A shard of the dataset, or the folder of a worker with a stream of its own.

    Attributes:
      state: "finished"; "running" while its owner sends heartbeats; "abandoned" when the last heartbeat is older than
        the owner's TTL and no other worker has taken over yet; "waiting" for a worker to claim it; "poisoned" when it
        is set aside. A stream's folder, which is not claimed, is "finished" or "unfinished".
      samples, tokens, windows, bytes: committed. tokens are those that the model saw.
      expected_samples: committed and remaining; None where the output has not enough information.
      computed_samples: by the current owner, committed or not.
      lease: epoch of the last one; 0: never claimed. owner: its owner.
      silent_s: since the last heartbeat of a held lease, or since a stream's last commit.
      failures: number of errors of its data; error: why it is set aside, or what is damaged.
    """

    shard: str
    state: State
    samples: int = 0
    expected_samples: int | None = None
    computed_samples: int = 0
    tokens: int = 0
    windows: int = 0
    bytes: int = 0
    lease: int = 0
    owner: dict[str, Any] | None = None
    silent_s: float | None = None
    failures: int = 0
    error: str | None = None

    def line(self) -> str:
        """The shard as a line of text."""
        of = "" if self.expected_samples is None else f" of {self.expected_samples}"
        parts = [f"{self.shard} {self.state}: {self.samples}{of} samples"]
        if self.owner is not None:
            verb = "released by " if self.state in ("waiting", "poisoned") else ""
            parts.append(verb + "worker {worker_id} on {host}, process {pid}".format(**self.owner))
        if self.silent_s is not None:
            event = "last commit" if self.owner is None else "last heartbeat"
            parts.append(f"{event} {self.silent_s:.0f} s ago")
        if self.error is not None:
            parts.append(self.error)
        return printable(", ".join(parts))


@dataclass(frozen=True)
class FleetStatus:
    """The status of a whole output.

    Attributes:
      finished: whether every shard is finished.
      settled: whether every shard is finished or set aside, so that nothing is left to do.
      states: how many shards are in each state.
      workers: processes that hold a running shard.
      samples_per_second, tokens_per_second: recent rates of the whole fleet; None before they can be measured.
      eta_s: seconds until everything is committed at that rate; None where it is unknown.
      notes: what is missing beyond single shards.
    """

    url: str
    finished: bool
    settled: bool
    states: dict[str, int]
    samples: int
    expected_samples: int | None
    tokens: int
    bytes: int
    workers: int
    samples_per_second: float | None
    tokens_per_second: float | None
    eta_s: float | None
    shards: tuple[ShardStatus, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The status as plain values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The status as lines of text; shards that are finished, or were never claimed, are only counted."""
        states = ", ".join(f"{count} {state}" for state, count in self.states.items())
        of = "" if self.expected_samples is None else f" of {self.expected_samples}"
        share = f" ({self.samples / self.expected_samples:.1%})" if self.expected_samples else ""
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        pace = "no throughput yet"
        if self.samples_per_second is not None:
            pace = f"{self.samples_per_second:.2f} samples/s, {self.tokens_per_second:.0f} tokens/s"
        left = f", about {timedelta(seconds=round(self.eta_s))} left" if self.eta_s else ""
        return [
            f"{self.url}: {states}",
            f"{self.samples}{of} samples{share}, {self.tokens} tokens, {workers}, {pace}{left}",
            *(shard.line() for shard in self.shards if shard.state != "finished" and (shard.lease or shard.windows)),
            *map(printable, self.notes),
        ]


def fleet_status(
    url: str, shards: Sequence[ShardStatus], commits: Sequence[Commit], now: float, notes: Sequence[str] = ()
) -> FleetStatus:
    """The sums over `shards`; `commits` in order, `now` by the same clock; no `notes` in a finished output."""
    states = Counter[str](shard.state for shard in shards)
    settled = bool(shards) and states.keys() <= {"finished", "poisoned"} and not notes
    rate = rate_of(commits, commits[-1].at if settled and commits else now)
    left = [None if s.expected_samples is None else s.expected_samples - s.samples for s in shards]
    return FleetStatus(
        url=url,
        finished=settled and "poisoned" not in states,
        settled=settled,
        states=dict(sorted(states.items())),
        samples=sum(shard.samples for shard in shards),
        expected_samples=None if None in left or notes else sum(shard.expected_samples or 0 for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        workers=len({tuple(shard.owner.values()) for shard in shards if shard.state == "running" and shard.owner}),
        samples_per_second=None if rate is None else round(rate[0], 3),
        tokens_per_second=None if rate is None else round(rate[1], 1),
        eta_s=0.0 if settled else _eta([n for n, s in zip(left, shards, strict=True) if s.state != "poisoned"], rate),
        shards=tuple(shards),
        notes=tuple(notes),
    )


def _eta(left: Sequence[int | None], rate: tuple[float, float] | None) -> float | None:
    if rate is None or not rate[0]:
        return None
    known = [samples for samples in left if samples is not None]
    return round(sum(known) / rate[0], 1) if len(known) == len(left) else None


def rate_of(commits: Sequence[Commit], now: float) -> tuple[float, float] | None:
    """Recent samples and tokens per second, from commits in order; None when there is nothing to measure.

    The first commit only starts the clock: when its work began is unknown.
    """
    recent = next((place for place, commit in enumerate(commits) if commit.at > now - _RATE_OVER_S), len(commits))
    start = max(min(recent, len(commits) - _RATE_OVER_COMMITS) - 1, 0)
    measured = commits[start + 1 :]
    seconds = max(now, measured[-1].at) - commits[start].at if measured else 0.0
    if seconds <= 0:
        return None
    return sum(commit.samples for commit in measured) / seconds, sum(commit.tokens for commit in measured) / seconds
