"""How fast hidden states are written as Parquet, beside pyarrow and datasets: python -m benchmarks.parquet."""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from absl.flags import argparse_flags
from pyarrow import parquet

from benchmarks.common.measuring import Timings, alternate, machine, table
from core.base.command_line import CommandParser, positive, run_command
from parquet_cache.parquet.shard_file import STATES, ShardSchema, ShardWriter

_SHORTEST, _LONGEST = 60, 140


@dataclass(frozen=True)
class WriterSpeed:
    """Bytes and rows a second of processor time, and bytes a second of the clock."""

    writer: str
    mb_per_cpu_s: float
    mb_per_s: float
    rows_per_cpu_s: float


def states_of(args: argparse.Namespace) -> list[np.ndarray]:
    """Of each row an (L, T, D) float16 array."""
    rng = np.random.default_rng(0)
    longest = rng.standard_normal((args.layers, _LONGEST, args.d_model)).astype(np.float16)
    return [np.ascontiguousarray(longest[:, :n]) for n in rng.integers(_SHORTEST, _LONGEST, args.rows)]


def write_ours(states: list[np.ndarray], path: Path) -> None:
    """By `prepare.py`'s writer."""
    n_layers, _, d_model = states[0].shape
    with open(path, "wb", buffering=1 << 20) as file:
        writer = ShardWriter(file, ShardSchema(n_layers, d_model, "float16", pa.schema([])))
        for row in states:
            writer.add(list(row), np.arange(row.shape[1], dtype=np.int32), ())
        writer.finish()


def arrow_table(states: list[np.ndarray]) -> pa.Table:
    """The same lists in Arrow."""
    n_layers, _, d_model = states[0].shape
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([row.reshape(-1) for row in states])), d_model)
    ends = np.cumsum(np.repeat([row.shape[1] for row in states], n_layers))
    tokens = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], ends]).astype(np.int32)), vectors)
    return pa.table({STATES: pa.FixedSizeListArray.from_arrays(tokens, n_layers)})


def sides(states: list[np.ndarray], folder: Path) -> dict[str, Callable[[], object]]:
    """Each writer, and pyarrow's reader, by name."""
    import datasets

    datasets.disable_progress_bars()
    arrow, ours = arrow_table(states), folder / "ours.parquet"
    write_ours(states, ours)
    plain = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    return {
        "ours": lambda: write_ours(states, folder / "again.parquet"),
        "pyarrow, plain, no statistics": lambda: parquet.write_table(arrow, folder / "plain.parquet", **plain),
        "pyarrow, defaults": lambda: parquet.write_table(arrow, folder / "default.parquet"),
        "datasets, to_parquet": lambda: datasets.Dataset(arrow).to_parquet(folder / "datasets.parquet"),
        "read by pyarrow, one thread": lambda: parquet.ParquetFile(ours).read([STATES], use_threads=False),
    }


def speeds(timings: dict[str, Timings], n_rows: int, n_bytes: int) -> list[WriterSpeed]:
    """The medians."""
    found = []
    for name, of in timings.items():
        cpu, wall = float(np.median(of.cpu)), float(np.median(of.wall))
        found.append(WriterSpeed(name, round(n_bytes / cpu / 1e6), round(n_bytes / wall / 1e6), round(n_rows / cpu)))
    return found


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add = parser.add_argument
    add("--rows", type=positive(int), default=60, help="texts of 60 to 140 tokens (default 60)")
    add("--layers", type=positive(int), default=12, help="default 12, as in the GPT-2 of the described use")
    add("--d_model", type=positive(int), default=768, help="default 768")
    add("--repeats", type=positive(int), default=3, help="default 3")
    add("--json", action="store_true", help="print one JSON object on stdout instead of the table")
    add("--verbose", action="store_true", help="show stack traces")
    return parser


def run(args: argparse.Namespace) -> None:
    """Times all sides in turn and prints them."""
    states = states_of(args)
    with tempfile.TemporaryDirectory(prefix="parquet_") as folder:
        timings = alternate(sides(states, Path(folder)), args.repeats)
    found = speeds(timings, len(states), sum(row.nbytes for row in states))
    if args.json:
        print(json.dumps({"machine": machine(), "speeds": [asdict(one) for one in found]}))
        return
    rows = [[one.writer, one.mb_per_cpu_s, one.mb_per_s, one.rows_per_cpu_s] for one in found]
    print(table(["", "MB/s of one core", "MB/s", "rows/s of one core"], rows))


if __name__ == "__main__":
    run_command(run, build_parser)
