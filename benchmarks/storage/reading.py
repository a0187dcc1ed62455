"""What reading stored activations costs: one layer of shards of several layers, in order and shuffled.

Against numpy on the same bytes, `datasets` with a shuffle, and SAELens' reading of its cache. See README.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from absl.flags import argparse_flags

from benchmarks.common.cases import add_output_flags
from benchmarks.common.measuring import Timings, alternate, machine, table
from benchmarks.storage.reading_peers import (
    CONTEXT,
    PEERS,
    missing_package,
    reader,
    write_contexts,
    write_rows,
)
from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.command_line import CommandParser, positive, run_command
from core.base.safetensors_file import header_end, tensor_spans
from core.reading import Activations, open_activations

FORMATS = ("safetensors", "planes")
LAYERS = (6, 12)
LAYER = 6
SITE = "residual"


@dataclass(frozen=True)
class Side:
    """One way to read. `read` returns how many tokens it gave."""

    name: str
    read: Callable[[], int]


@dataclass(frozen=True)
class ReadingRow:
    """One side. Rates count the stored values, two bytes each: million bytes a second, by the medians."""

    name: str
    tokens: int
    wall_mb_s: float
    cpu_mb_s: float


@dataclass(frozen=True)
class Target:
    """A wanted ratio of two rates; `cpu` by CPU time, `wall` by wall time."""

    name: str
    wanted: float
    cpu: float
    wall: float


def write_runs(folder: Path, args: argparse.Namespace) -> dict[str, Activations]:
    """The same random bfloat16 values in each format."""
    lengths = [[CONTEXT] * args.samples] * args.shards
    for name in FORMATS:
        write_run(folder / name, SyntheticRun({SITE: (LAYERS, args.width)}, shard_format=name), lengths)
    return {name: open_activations(str(folder / name)) for name in FORMATS}


def read_batches(acts: Activations, batch_size: int, **settings: Any) -> int:
    """Our reader, over one epoch."""
    return sum(len(batch) for batch in acts.tokens(LAYER, SITE, batch_size=batch_size, **settings))


def read_raw(folder: Path, width: int, *, is_mapped: bool) -> int:
    """The bytes of the layer alone, copied from each file to a new array by numpy."""
    tokens = 0
    for path in sorted(folder.glob("tpu_0/*.safetensors")):
        with path.open("rb") as file:
            start = file.read(8)
            head = start + file.read(header_end(start) - 8)
        span = tensor_spans(head, path.stat().st_size)[f"layer_{LAYER}"]
        count = (span.stop - span.start) // 2
        if is_mapped:
            values = np.array(np.memmap(path, np.uint16, "r", span.start, (count,)))
        else:
            values = np.fromfile(path, np.uint16, count, offset=span.start)
        tokens += len(values) // width
    return tokens


def our_sides(runs: dict[str, Activations], folder: Path, args: argparse.Namespace) -> list[Side]:
    """numpy, then our reader in each format."""
    shuffle = {"shuffle": True, "buffer_bytes": args.buffer_mb << 20}
    raw = folder / "safetensors"
    sides = [
        Side("numpy.fromfile", partial(read_raw, raw, args.width, is_mapped=False)),
        Side("numpy.memmap, copied", partial(read_raw, raw, args.width, is_mapped=True)),
    ]
    for name, acts in runs.items():
        read = partial(read_batches, acts, args.batch_size)
        sides += [
            Side(f"{name}, in order, as stored", partial(read, restore=False)),
            Side(f"{name}, in order, float32", read),
            Side(f"{name}, shuffled, as stored", partial(read, restore=False, **shuffle)),
            Side(f"{name}, shuffled, float32", partial(read, **shuffle)),
        ]
    return sides


def peer_sides(acts: Activations, folder: Path, args: argparse.Namespace) -> list[Side]:
    """The peers that are installed, each with the same values in its own format."""

    n_tokens = min(args.peer_tokens, acts.n_tokens)

    def tokens() -> Iterator[np.ndarray]:
        # Twice what is read of them: a smaller set than ours, which is to their advantage.
        batches = acts.tokens(LAYER, SITE, batch_size=args.batch_size)
        return (batch.activations for batch in islice(batches, -(-2 * n_tokens // args.batch_size)))

    sides = []
    for peer in args.peers:
        package = missing_package(peer)
        if package is not None:
            print(f"{peer}: {package} is not installed: pip install '.[peers]'", file=sys.stderr)
            continue
        home = folder / ("contexts" if peer == "SAELens" else "rows")
        if not home.exists():
            (write_contexts if peer == "SAELens" else write_rows)(home, args.width, tokens)
        sides.append(Side(peer, reader(peer, home, args.batch_size, n_tokens, args.width)))
    return sides


def measure(sides: Sequence[Side], width: int, repeats: int) -> list[ReadingRow]:
    """Every side in turn, after one round that is not counted and brings all files into the page cache."""
    tokens = {side.name: side.read() for side in sides}
    timings = alternate({side.name: side.read for side in sides}, repeats)
    return [_row(name, tokens[name], timings[name], width) for name in tokens]


def _row(name: str, tokens: int, timings: Timings, width: int) -> ReadingRow:
    million = tokens * width * 2 / 1e6
    return ReadingRow(
        name, tokens, round(million / max(timings.seconds, 1e-3), 1), round(million / max(timings.cpu_seconds, 1e-6), 1)
    )


def targets(rows: Sequence[ReadingRow]) -> list[Target]:
    """What was aimed at, and what was reached. The faster of numpy's two ways and of `datasets`' two ways count."""
    by_name = {row.name: row for row in rows}

    def target(name: str, wanted: float, ours: str, *others: str) -> Target:
        found = [by_name[other] for other in others if other in by_name]
        cpu = by_name[ours].cpu_mb_s / max(row.cpu_mb_s for row in found)
        wall = by_name[ours].wall_mb_s / max(row.wall_mb_s for row in found)
        return Target(name, wanted, round(cpu, 2), round(wall, 2))

    shuffled, stored = "safetensors, shuffled, float32", "safetensors, shuffled, as stored"
    in_order, plain = "safetensors, in order, float32", "safetensors, in order, as stored"
    found = [
        target("safetensors in order / numpy", 0.8, plain, "numpy.fromfile", "numpy.memmap, copied"),
        target("shuffled / in order, float32", 0.5, shuffled, in_order),
        target("shuffled / in order, as stored", 0.5, stored, plain),
        target("planes shuffled / in order", 0.5, "planes, shuffled, float32", "planes, in order, float32"),
    ]
    datasets = [name for name in by_name if name.startswith("datasets")]
    if datasets:
        found.append(target("shuffled / datasets", 5, shuffled, *datasets))
    return found + ([target("shuffled / SAELens", 3, shuffled, "SAELens")] if "SAELens" in by_name else [])


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--shards", type=positive(int), default=8, help="windows (default 8)")
    add("--samples", type=positive(int), default=500, help=f"samples of {CONTEXT} tokens in each (default 500)")
    add("--width", type=positive(int), default=576, help="values of an activation (default 576)")
    add("--batch_size", type=positive(int), default=4096, help="tokens of a batch, of every side (default 4096)")
    add("--buffer_mb", type=positive(int), default=128, help="our shuffle's buffer in MiB (default 128)")
    add("--peers", nargs="*", choices=tuple(PEERS), default=tuple(PEERS), help="others to measure (default all)")
    add("--peer_tokens", type=positive(int), default=65536, help="tokens that a peer reads in a round (default 65536)")
    add("--work_dir", type=Path, help="where to write files (default: a temporary folder)")
    add("--verbose", action="store_true", help="stack traces of errors")
    add_output_flags(parser, repeats=5)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory(prefix="reading_", dir=args.work_dir) as scratch:
        folder = Path(scratch)
        runs = write_runs(folder, args)
        sides = our_sides(runs, folder, args) + peer_sides(runs["safetensors"], folder, args)
        rows = measure(sides, args.width, args.repeats)
        n_bytes = runs["safetensors"].n_tokens * args.width * 2
    aimed = targets(rows)
    if args.json:
        found = {"machine": machine(), "bytes_of_a_layer": n_bytes, "rows": [asdict(row) for row in rows]}
        print(json.dumps(found | {"targets": [asdict(target) for target in aimed]}))
        return
    print(f"{machine()['cpu']}: one layer of {len(LAYERS)}, {n_bytes / 1e6:.0f} MB of bfloat16, width {args.width}")
    print(table(["side", "MB/s of CPU time", "MB/s"], [[row.name, row.cpu_mb_s, row.wall_mb_s] for row in rows]))
    met = [[each.name, each.wanted, each.cpu, each.wall, "yes" if each.cpu >= each.wanted else "no"] for each in aimed]
    print(table(["ratio", "wanted", "of CPU time", "of wall time", "met"], met))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
