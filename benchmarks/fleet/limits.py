"""Where a fleet saturates, on paper: what its chips produce against the capacity of every link. See docs/scaling.md."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from absl.flags import argparse_flags

from benchmarks.common.measuring import table
from core.base.command_line import CommandParser, positive, run_command
from core.claims.leases import DEFAULT_HEARTBEAT_S, SHARDS_A_HEARTBEAT, poll_interval_s


@dataclass(frozen=True)
class ChipLoad:
    """A model on a chip, what is captured, and the source of the rate.

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
        """Bytes per second of arrays that leave one chip."""
        return self.tokens_per_second * self.layers * self.d_model * self.item_bytes


# A lease, its heartbeat and its release; one request lists 1,000 objects.
_LISTINGS_PER_SHARD = 3 / 1000
# To check a finished dataset shard: its release, a listing of its folder and its index, besides each commit record.
_LOOKS_PER_SHARD = 3
# The time in which every worker checks all outputs.
_ENDING_S = 600.0
_LABORATORY = "the TPU compiler's estimate for v5e, rows of 2,048 tokens (benchmarks/README.md, tpu_estimate)"
LOADS = (
    ChipLoad("Qwen2.5-0.5B, all 24 layers", 155_629, 24, 896, _LABORATORY),
    ChipLoad("Gemma-2-2b, one layer", 69_633, 1, 2304, _LABORATORY),
    ChipLoad("Qwen2.5-7B, one layer", 24_667, 1, 3584, _LABORATORY),
)


@dataclass(frozen=True)
class Limits:
    """The capacity of a host and a bucket; docs/scaling.md has the source of each number.

    Attributes:
      link_bytes: per second from chip to host; nic_bytes: from a host to the network; bucket_bytes: into a bucket.
      encode_bytes: of arrays that a core encodes per second; ratio: bytes of arrays per byte stored.
      writes, reads: requests per second that a new bucket takes.
      shards_per_worker: dataset shards; windows_per_shard: windows of a dataset shard, each with a commit record.
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
class ResourceLoad:
    """The demand on a resource, its capacity, and the number of workers that saturates it."""

    resource: str
    demand: float
    capacity: float
    saturates_at: float | None

    @property
    def load(self) -> float:
        """Demand over capacity; above 1 the fleet waits for the resource."""
        return self.demand / self.capacity

    @property
    def where(self) -> str:
        """As text: the number of workers from which the fleet waits for the resource."""
        if self.saturates_at is None:
            return "always" if self.load > 1 else "never"
        return f"{self.saturates_at:.0f} workers"


def rows(load: ChipLoad, workers: int, limits: Limits) -> list[ResourceLoad]:
    """Every resource; a worker is a host. The load of a host does not depend on the number of workers."""
    host_bytes = load.bytes_per_second * limits.chips_per_host
    stored = host_bytes / limits.ratio
    windows = host_bytes / limits.shard_bytes
    writes = 3 * windows + 1 / limits.heartbeat_s
    per_host = [
        ResourceLoad("chip to host, B/s", load.bytes_per_second, limits.link_bytes, None),
        ResourceLoad("cores that encode", host_bytes / limits.encode_bytes, limits.cores_per_host, None),
        ResourceLoad("host to network, B/s", stored, limits.nic_bytes, None),
    ]
    shared = [
        ResourceLoad("into the bucket, B/s", workers * stored, limits.bucket_bytes, limits.bucket_bytes / stored),
        ResourceLoad("bucket writes/s", workers * writes, limits.writes, limits.writes / writes),
        claim_row(workers, limits),
        ending_row(workers, limits),
    ]
    return per_host + shared


def claim_row(workers: int, limits: Limits) -> ResourceLoad:
    """While some workers hold all that is left, the others list all claims at each look; worst if half of them wait."""
    shards = workers * limits.shards_per_worker
    a_look = shards * _LISTINGS_PER_SHARD
    demand = workers / 2 * a_look / poll_interval_s(limits.heartbeat_s, shards)
    # The larger of two: looks at a growing listing; a fixed number of listings per heartbeat and worker.
    of_a_worker = limits.shards_per_worker * _LISTINGS_PER_SHARD
    growing = (2 * limits.reads * limits.heartbeat_s / of_a_worker) ** 0.5
    paced = 2 * limits.reads * limits.heartbeat_s / (SHARDS_A_HEARTBEAT * _LISTINGS_PER_SHARD)
    return ResourceLoad("claims listed/s, half waiting for half", demand, limits.reads, max(growing, paced))


def ending_row(workers: int, limits: Limits) -> ResourceLoad:
    """Once every dataset shard has been begun, each worker checks the output of every finished one once."""
    of_a_worker = limits.shards_per_worker * (_LOOKS_PER_SHARD + limits.windows_per_shard) / _ENDING_S
    demand = workers**2 * of_a_worker
    return ResourceLoad(
        "outputs checked/s, within 10 minutes", demand, limits.reads, (limits.reads / of_a_worker) ** 0.5
    )


def report(load: ChipLoad, workers: Sequence[int], limits: Limits) -> str:
    """A table of loads by number of workers, and where each resource saturates."""
    by_workers = [rows(load, n, limits) for n in workers]
    lines = [
        [resource[0].resource, *(f"{row.load:.1%}" for row in resource), resource[0].where]
        for resource in zip(*by_workers, strict=True)
    ]
    return table([load.name, *(f"{n} workers" for n in workers), "saturates"], lines)


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--workers", type=positive(int), nargs="+", default=[1, 10, 100, 1000], help="hosts (default 1 10 100 1000)")
    add("--tokens_per_second", type=positive(float), help="of one chip, instead of those of the table")
    for name, value in asdict(Limits()).items():
        add(f"--{name}", type=positive(type(value)), default=value, help=f"see docs/scaling.md (default {value:g})")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the tables")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Prints a table for each load."""
    limits = Limits(**{name: getattr(args, name) for name in asdict(Limits())})
    loads: Sequence[ChipLoad] = LOADS
    if args.tokens_per_second is not None:
        loads = [
            replace(load, tokens_per_second=args.tokens_per_second, source="--tokens_per_second") for load in LOADS
        ]
    if args.json:
        found = [
            {"load": asdict(load), "workers": n, "rows": [asdict(row) for row in rows(load, n, limits)]}
            for load in loads
            for n in args.workers
        ]
        print(json.dumps(found))
        return
    for load in loads:
        print(report(load, args.workers, limits))
        print(f"{load.tokens_per_second:.0f} tokens/s a chip: {load.source}\n")


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
