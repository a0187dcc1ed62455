"""What layouts of arrays cost in Parquet and Arrow files, on SmolLM2's activations of ARC prompts. See README.md.

A row is a sample, its value an array (K, D). Whether Hugging Face datasets loads the column as an array is decided by
its type alone: it has to be lists of lists.
"""

import argparse
import io
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl.flags import argparse_flags
from jaxtyping import Shaped

from benchmarks.common.cases import add_output_flags, case_layers
from benchmarks.common.engine import Engine
from benchmarks.common.measuring import machine, table
from benchmarks.common.replay import cast, computed_once, window_activations
from benchmarks.common.workload import add_workload_flags, workload_of
from benchmarks.storage.benchmark import content_of, cpu_rate
from core.base.command_line import CommandParser, run_command
from core.base.dtypes import DTYPES
from core.shards.formats import FORMATS
from qwen2_jax import load_config

LAYOUTS = ("lists of lists", "lists of fixed-size lists", "flat lists", "lists of binaries")
GROUP_SAMPLES = 2
_DEFAULTS = "pyarrow's defaults"
_NO_DICTIONARY: dict[str, Any] = {"use_dictionary": False, "write_statistics": False}
ENCODINGS: dict[str, dict[str, Any]] = {
    _DEFAULTS: {},
    "not compressed": _NO_DICTIONARY | {"compression": "none"},
    "zstd 1": _NO_DICTIONARY | {"compression": "zstd", "compression_level": 1},
    "split, zstd 1": _NO_DICTIONARY | {"compression": "zstd", "compression_level": 1, "use_byte_stream_split": True},
}


@dataclass(frozen=True)
class LayoutRow:
    """One layout of the same arrays. Rates are million bytes of arrays for each second of CPU time, on one thread.

    ratio: bytes of arrays for each byte stored. is_loaded: whether datasets gives arrays.
    """

    dtype: str
    layout: str
    encoding: str
    ratio: float
    write: float
    read: float
    is_loaded: bool


def column(layout: str, values: Shaped[np.ndarray, "N D"], offsets: Sequence[int]) -> Any:
    """A column of one array for each sample."""
    import pyarrow

    width = values.shape[1]
    flat, ends = pyarrow.array(values.reshape(-1)), pyarrow.array(np.array(offsets, np.int32))
    if layout == "flat lists":
        return pyarrow.ListArray.from_arrays(pyarrow.array(np.array(offsets, np.int32) * width), flat)
    if layout == "lists of lists":
        row_ends = pyarrow.array(np.arange(len(values) + 1, dtype=np.int32) * width)
        rows = pyarrow.ListArray.from_arrays(row_ends, flat)
    elif layout == "lists of fixed-size lists":
        rows = pyarrow.FixedSizeListArray.from_arrays(flat, width)
    else:
        buffers = [None, pyarrow.py_buffer(values)]
        rows = pyarrow.FixedSizeBinaryArray.from_buffers(pyarrow.binary(width * values.itemsize), len(values), buffers)
    return pyarrow.ListArray.from_arrays(ends, rows)


def measure(layout: str, encoding: str, values: Shaped[np.ndarray, "N D"], offsets: Sequence[int], repeats: int) -> Any:
    """Writes and reads one layout in memory."""
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.table({"a": column(layout, values, offsets)})
    written = io.BytesIO()

    def write() -> None:
        written.seek(0)
        written.truncate()
        parquet.write_table(rows, written, row_group_size=GROUP_SAMPLES, **ENCODINGS[encoding])

    rate = cpu_rate(values.nbytes, write, repeats)
    read = cpu_rate(values.nbytes, partial(_read_parquet, written.getvalue()), repeats)
    ratio, is_loaded = round(values.nbytes / len(written.getvalue()), 3), layout == LAYOUTS[0]
    return LayoutRow(values.dtype.name, layout, encoding, ratio, rate, read, is_loaded)


def _read_parquet(data: bytes) -> None:
    from pyarrow import parquet

    parquet.read_table(io.BytesIO(data), use_threads=False)


def measure_formats(content: Any, repeats: int) -> list[LayoutRow]:
    """What this project writes, with token ids, previews and labels."""
    found = []
    for name in ("parquet", "arrow", "npz"):
        written = io.BytesIO()

        def write(name: str = name, written: io.BytesIO = written) -> None:
            written.seek(0)
            written.truncate()
            FORMATS[name].write(content, written)

        n_bytes = content.values.nbytes
        rate = cpu_rate(n_bytes, write, repeats)
        data = written.getvalue()
        read = cpu_rate(n_bytes, partial(_read_shard, name, data), repeats)
        ratio, is_loaded = round(n_bytes / len(data), 3), name != "npz"
        found.append(LayoutRow(content.values.dtype.name, f"--format {name}", "ours", ratio, rate, read, is_loaded))
    return found


def _read_shard(name: str, data: bytes) -> None:
    FORMATS[name].read(io.BytesIO(data))


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=16)
    dtypes = tuple(dtype for dtype in DTYPES if dtype in FORMATS["parquet"].dtypes)
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes, help="stored dtypes (default all)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS, help="of an array (default all)")
    add_output_flags(parser, repeats=3)
    return parser


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory(prefix="layouts_") as scratch:
        workload = workload_of(args, Path(scratch))
        layers = case_layers("middle", load_config(workload.model_path).n_layers)
        engine = Engine.load(
            workload.model_path, workload.token_stream, layers=layers, dtype="float32", batch_size=4, shard_mb=1 << 20
        )
        (computed,) = window_activations(engine.job, computed_once(engine))
    rows: list[LayoutRow] = []
    for dtype in args.dtypes:
        content = content_of(cast(computed, DTYPES[dtype]))
        values, offsets = np.ascontiguousarray(content.values[0]), content.offsets.tolist()
        rows += [measure(layout, name, values, offsets, args.repeats) for layout in args.layouts for name in ENCODINGS]
        rows += measure_formats(content, args.repeats)
    if args.json:
        print(json.dumps({"machine": machine(), "workload": workload.spread(), "rows": [asdict(row) for row in rows]}))
        return
    header = ["dtype", "layout", "encoding", "ratio", "write MB/s", "read MB/s", "arrays in datasets"]
    print(table(header, [list(asdict(row).values()) for row in rows]))


def main() -> None:
    """The console command."""
    run_command(run, build_parser)


if __name__ == "__main__":
    main()
