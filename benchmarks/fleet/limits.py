"""Where a fleet saturates, on paper: what chips make against every link that it crosses. See docs/scaling.md."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from absl.flags import argparse_flags

from benchmarks.common.measuring import table
from core.base.command_line import CommandParser, positive, run_command
from core.claims.leases import DEFAULT_HEARTBEAT_S, SHARDS_A_HEARTBEAT, poll_interval_s


@dataclass(frozen=True)
class Job:
    """A model on a chip, what is captured of it, and where the rate is from.

    Attributes:
      tokens_per_second: of one chip.
    """

    name: str
    tokens_per_second: float
    layers: int
    d_model: int
    source: str
    item_bytes: int = 2

    @property
    def bytes_per_second(self) -> float:
        """Of arrays that leave one chip."""
        return self.tokens_per_second * self.layers * self.d_model * self.item_bytes


# A lease, its sign of life and its end; one request lists 1,000 objects.
_LISTINGS_PER_SHARD = 3 / 1000
# Whether a finished shard is whole: its release, a listing of its folder, its index, and each commit record.
_LOOKS_PER_SHARD = 3
# In which every worker learns that nothing is left.
_ENDING_S = 600.0
_LABORATORY = "the TPU compiler's estimate for v5e, rows of 2,048 tokens (benchmarks/README.md, tpu_estimate)"
JOBS = (
    Job("Qwen2.5-0.5B, all 24 layers", 155_629, 24, 896, _LABORATORY),
    Job("Gemma-2-2b, one layer", 69_633, 1, 2304, _LABORATORY),
    Job("Qwen2.5-7B, one layer", 24_667, 1, 3584, _LABORATORY),
)


@dataclass(frozen=True)
class Limits:
    """What a host and a bucket can carry; docs/scaling.md says where each number is from.

    Attributes:
      link_bytes: from a chip to its host a second; nic_bytes: from a host to the network; bucket_bytes: into a bucket.
      encode_bytes: of arrays that a core encodes a second; ratio: of them for each byte stored.
      writes, reads: requests that a bucket takes a second before it has grown.
      shards_per_worker: of the dataset; windows_per_shard: of a shard, each with a commit record.
    """

    chips_per_host: int = 4
    cores_per_host: int = 112
    link_bytes: float = 15e9
    nic_bytes: float = 12.5e9
    bucket_bytes: float = 125e9
    encode_bytes: float = 360e6
    ratio: float = 1.27
    shard_bytes: float = 2**30
    writes: float = 1000.0
    reads: float = 5000.0
    heartbeat_s: float = DEFAULT_HEARTBEAT_S
    shards_per_worker: float = 8.0
    windows_per_shard: float = 4.0


@dataclass(frozen=True)
class Row:
    """A resource: what `workers` ask of it, what there is, and with how many workers nothing is left."""

    resource: str
    demand: float
    capacity: float
    saturates_at: float | None

    @property
    def load(self) -> float:
        """Above 1, the fleet waits for it."""
        return self.demand / self.capacity

    @property
    def where(self) -> str:
        """For people: from how many workers on the fleet waits for it."""
        if self.saturates_at is None:
            return "always" if self.load > 1 else "never"
        return f"{self.saturates_at:.0f} workers"


def rows(job: Job, workers: int, limits: Limits) -> list[Row]:
    """Every resource; a worker is a host. Those of a host do not depend on how many there are."""
    host_bytes = job.bytes_per_second * limits.chips_per_host
    stored = host_bytes / limits.ratio
    windows = host_bytes / limits.shard_bytes
    writes = 3 * windows + 1 / limits.heartbeat_s
    per_host = [
        Row("chip to host, B/s", job.bytes_per_second, limits.link_bytes, None),
        Row("cores that encode", host_bytes / limits.encode_bytes, limits.cores_per_host, None),
        Row("host to network, B/s", stored, limits.nic_bytes, None),
    ]
    shared = [
        Row("into the bucket, B/s", workers * stored, limits.bucket_bytes, limits.bucket_bytes / stored),
        Row("bucket writes/s", workers * writes, limits.writes, limits.writes / writes),
        claim_row(workers, limits),
        ending_row(workers, limits),
    ]
    return per_host + shared


def claim_row(workers: int, limits: Limits) -> Row:
    """While others hold all that is left, each look of the rest lists all claims: the worst is half of the workers."""
    shards = workers * limits.shards_per_worker
    a_look = shards * _LISTINGS_PER_SHARD
    demand = workers / 2 * a_look / poll_interval_s(limits.heartbeat_s, shards)
    # The larger of both: looks of a growing listing, then as many listings a heartbeat of each worker.
    of_a_worker = limits.shards_per_worker * _LISTINGS_PER_SHARD
    growing = (2 * limits.reads * limits.heartbeat_s / of_a_worker) ** 0.5
    paced = 2 * limits.reads * limits.heartbeat_s / (SHARDS_A_HEARTBEAT * _LISTINGS_PER_SHARD)
    return Row("claims listed/s, half waiting for half", demand, limits.reads, max(growing, paced))


def ending_row(workers: int, limits: Limits) -> Row:
    """Once every shard has been begun, each worker looks once at the output of each that is called done."""
    of_a_worker = limits.shards_per_worker * (_LOOKS_PER_SHARD + limits.windows_per_shard) / _ENDING_S
    demand = workers**2 * of_a_worker
    return Row("outputs checked/s, within 10 minutes", demand, limits.reads, (limits.reads / of_a_worker) ** 0.5)


def report(job: Job, workers: Sequence[int], limits: Limits) -> str:
    """Loads by the number of workers, and where each resource saturates."""
    by_workers = [rows(job, n, limits) for n in workers]
    lines = [
        [resource[0].resource, *(f"{row.load:.1%}" for row in resource), resource[0].where]
        for resource in zip(*by_workers, strict=True)
    ]
    return table([job.name, *(f"{n} workers" for n in workers), "saturates"], lines)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--workers", type=positive(int), nargs="+", default=[1, 10, 100, 1000], help="hosts (default 1 10 100 1000)")
    add("--tokens_per_second", type=positive(float), help="of one chip, instead of the table's")
    for name, value in asdict(Limits()).items():
        add(f"--{name}", type=positive(type(value)), default=value, help=f"(default {value:g})")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the tables")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints a table for each job."""
    limits = Limits(**{name: getattr(args, name) for name in asdict(Limits())})
    jobs: Sequence[Job] = JOBS
    if args.tokens_per_second is not None:
        jobs = [replace(job, tokens_per_second=args.tokens_per_second, source="--tokens_per_second") for job in JOBS]
    if args.json:
        found = [
            {"job": asdict(job), "workers": n, "rows": [asdict(row) for row in rows(job, n, limits)]}
            for job in jobs
            for n in args.workers
        ]
        print(json.dumps(found))
        return
    for job in jobs:
        print(report(job, args.workers, limits))
        print(f"{job.tokens_per_second:.0f} tokens/s a chip: {job.source}\n")


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
