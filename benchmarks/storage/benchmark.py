"""What storing activations costs: every format and compressor on SmolLM2's activations of ARC prompts. See README.md.

The baseline is the usual code, `gzip.open(…, compresslevel=6)` and `pickle.dump`, on one core.
"""

import argparse
import gzip
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl.flags import argparse_flags

from benchmarks.common.cases import CASES, add_output_flags, case_layers
from benchmarks.common.engine import Engine
from benchmarks.common.measuring import Ratio, Timings, alternate, machine, table
from benchmarks.common.replay import cast, computed_once, replayed, window_activations
from benchmarks.common.workload import Workload, add_workload_flags, build_workload, workload_of
from benchmarks.storage.codecs import CODECS, blocks_of, entropy_ratio
from benchmarks.storage.uploads import Busy, UploadResult, measure_upload
from core.base.command_line import CommandParser, not_negative, positive, run_command
from core.base.dtypes import DTYPES
from core.object_store import LocalStore, ObjectInfo
from core.object_store.sinks import ParallelGzipWriter
from core.shards.encoding import ShardEncoder
from core.shards.formats import FORMATS, ShardContent, read_shard
from core.shards.formats.base import stored_sample
from core.shards.window_activations import WindowActivations
from qwen2_jax import load_config

BASELINE = "gzip 6 + pickle.dump"
FOLDER = "tpu_0"
# By name in the table: a format, and whether it is gzipped.
WAYS = {"pickle.gz": ("pickle", True)} | {name: (name, False) for name in FORMATS}
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class StorageRow:
    """One way to store the same activations. Rates are million bytes of arrays for each second of CPU time.

    Attributes:
      ratio: bytes of arrays for each byte stored.
      encode: to a file, as the baseline does; compressors alone: in memory.
      store: with digests too, as a run does.
      read: back into arrays.
      encode_speedup, store_speedup: over `encode` of the baseline; None for compressors.
    """

    case: str
    dtype: str
    way: str
    ratio: float
    encode: float | None
    store: float | None
    read: float
    encode_speedup: float | None
    store_speedup: float | None


@dataclass(frozen=True)
class StorageResult:
    """One case and dtype. `entropy_ratio`: see `codecs`; `cores`: how `encode` scales, by wall time."""

    case: str
    dtype: str
    bytes: int
    entropy_ratio: float
    rows: list[StorageRow]
    cores: dict[str, dict[int, float]]


@dataclass(frozen=True)
class DiskResult:
    """safetensors, digested and published by the engine, against a plain write and fsync of the same bytes."""

    bytes: int
    raw_mb_s: float
    ours_mb_s: float
    ratio: Ratio


def encode(content: ShardContent, way: str, threads: ThreadPoolExecutor, path: Path) -> None:
    """Writes only the file, as the baseline does: no digests."""
    name, gzipped = WAYS[way]
    with path.open("wb") as sink:
        if gzipped:
            compressor = ParallelGzipWriter(sink, threads)
            FORMATS[name].write(content, compressor)
            compressor.close()
        else:
            FORMATS[name].write(content, sink, threads)
    path.unlink()


def store(activations: WindowActivations, way: str, folder: Path, threads: ThreadPoolExecutor) -> Path:
    """The shard file of the engine's own encoder, not yet published."""
    name, gzipped = WAYS[way]
    shard, table_file = ShardEncoder(FORMATS[name], gzipped, LocalStore(folder), way, threads).encode(activations)
    table_file.path.unlink()
    return shard.path


def store_baseline(content: ShardContent, path: Path) -> Path:
    """Writes the file of the baseline."""
    samples = range(len(content.samples))
    shard = {layer: [stored_sample(content, slot, s) for s in samples] for slot, layer in enumerate(content.layers)}
    with gzip.open(path, "wb", compresslevel=6) as file:
        pickle.dump(shard, file)
    return path


def read_baseline(path: Path) -> None:
    """Reads what `store_baseline` wrote."""
    with gzip.open(path) as file:
        pickle.load(file)


def _read(path: Path, way: str) -> None:
    name, gzipped = WAYS[way]
    with path.open("rb") as file:
        read_shard(file, name, gzipped=gzipped)


def cpu_rate(n_bytes: int, side: Callable[[], object], repeats: int) -> float:
    """Million bytes a second of CPU time, by the median."""
    timings = Timings()
    for _ in range(repeats):
        timings.run(side)
    return round(n_bytes / 1e6 / max(timings.cpu_seconds, 1e-6), 1)


def measure_ways(
    case: str, activations: WindowActivations, folder: Path, ways: Sequence[str], repeats: int
) -> list[StorageRow]:
    """The baseline, then each way, on one thread."""
    content = content_of(activations)
    n_bytes, dtype = content.values.nbytes, content.values.dtype.name
    path = folder / "baseline.pkl.gz"
    base = cpu_rate(n_bytes, partial(store_baseline, content, path), repeats)
    read = cpu_rate(n_bytes, partial(read_baseline, path), repeats)
    rows = [StorageRow(case, dtype, BASELINE, ratio_of(n_bytes, path), base, None, read, 1.0, None)]
    path.unlink()
    with ThreadPoolExecutor(1) as thread:
        return rows + [measure_way(case, way, activations, folder, thread, base, repeats) for way in ways]


def measure_way(
    case: str,
    way: str,
    activations: WindowActivations,
    folder: Path,
    thread: ThreadPoolExecutor,
    baseline: float,
    repeats: int,
) -> StorageRow:
    """One way; `baseline` is the rate of `store_baseline`."""
    content = content_of(activations)
    n_bytes, dtype = content.values.nbytes, content.values.dtype.name
    path = store(activations, way, folder, thread)
    ratio, read = ratio_of(n_bytes, path), cpu_rate(n_bytes, partial(_read, path, way), repeats)
    path.unlink()
    encoded = cpu_rate(n_bytes, partial(encode, content, way, thread, path), repeats)

    def store_and_clear() -> None:
        store(activations, way, folder, thread).unlink()

    stored = cpu_rate(n_bytes, store_and_clear, repeats)
    return StorageRow(
        case, dtype, way, ratio, encoded, stored, read, round(encoded / baseline, 1), round(stored / baseline, 1)
    )


def measure_codec(case: str, array: np.ndarray, name: str, repeats: int) -> StorageRow:
    """A compressor alone, on one thread."""
    codec, blocks = CODECS[name], list(blocks_of(array))
    packed = [codec.compress(block) for block in blocks]
    encoded = cpu_rate(array.nbytes, lambda: [codec.compress(block) for block in blocks], repeats)
    pairs = list(zip(packed, blocks, strict=True))
    read = cpu_rate(array.nbytes, lambda: [codec.decompress(*pair) for pair in pairs], repeats)
    ratio = round(array.nbytes / sum(map(len, packed)), 3)
    return StorageRow(case, array.dtype.name, name, ratio, encoded, None, read, None, None)


def measure_cores(
    content: ShardContent, ways: Sequence[str], folder: Path, repeats: int
) -> dict[str, dict[int, float]]:
    """Million bytes a second of wall time by number of threads, up to the number of cores."""
    cores = range(1, machine()["cores"] + 1)
    pools = {n: ThreadPoolExecutor(n) for n in cores}
    sides: dict[str, Callable[[], object]] = {
        f"{way} {n}": partial(encode, content, way, pools[n], folder / "encoded") for way in ways for n in cores
    }
    timings = alternate(sides, repeats)
    for pool in pools.values():
        pool.shutdown()
    million = content.values.nbytes / 1e6
    return {way: {n: round(million / timings[f"{way} {n}"].seconds, 1) for n in cores} for way in ways}


def content_of(activations: WindowActivations) -> ShardContent:
    """The shard of the only site."""
    (site,) = activations.layers
    return activations.content(site)


def ratio_of(n_bytes: int, path: Path) -> float:
    """The compression ratio of a stored file."""
    return round(n_bytes / path.stat().st_size, 3)


def measure_case(case: str, workload: Workload, folder: Path, args: argparse.Namespace) -> list[StorageResult]:
    """One case in every dtype: computed once in float32, rounded as the device does."""
    layers = case_layers(case, load_config(workload.model_path).n_layers)
    engine = Engine.load(
        workload.model_path, workload.token_stream, layers=layers, dtype="float32", batch_size=4, shard_mb=1 << 20
    )
    (computed,) = window_activations(engine.job, computed_once(engine))
    results = []
    for dtype in args.dtypes:
        activations = cast(computed, DTYPES[dtype])
        content = content_of(activations)
        ways = [way for way in args.ways if dtype in FORMATS[WAYS[way][0]].dtypes]
        rows = measure_ways(case, activations, folder, ways, args.repeats)
        if case == "middle":
            rows += [measure_codec(case, content.values, name, args.repeats) for name in args.codecs]
        scaling = measure_cores(
            content, [way for way in args.ways if way in ("pickle.gz", "planes")], folder, args.repeats
        )
        entropy = round(entropy_ratio(content.values), 3)
        results.append(StorageResult(case, dtype, content.values.nbytes, entropy, rows, scaling))
    return results


def measure_disk(workload: Workload, folder: Path, repeats: int) -> DiskResult:
    """Every layer in bfloat16. Both sides write to `folder`, so choose one on the disk to measure."""
    disk = LocalStore(folder)
    engine = storage_engine(workload, shard_mb=1 << 20)
    (activations,) = window_activations(engine.job, computed_once(engine))
    with ThreadPoolExecutor(1) as thread:
        data = store(activations, "safetensors", folder, thread).read_bytes()

        def ours() -> None:
            encoder = ShardEncoder(FORMATS["safetensors"], False, disk, FOLDER, thread, syncs=True)
            for file in encoder.encode(activations):
                disk.create_file(f"{FOLDER}/{file.name}", file.path, ObjectInfo(file.digest.bytes, file.digest.crc32c))
                disk.delete(f"{FOLDER}/{file.name}")

        timings = alternate({"raw": lambda: write_raw(data, folder / "raw"), "ours": ours}, repeats)
    million = len(data) / 1e6
    return DiskResult(
        bytes=len(data),
        raw_mb_s=round(million / timings["raw"].seconds, 1),
        ours_mb_s=round(million / timings["ours"].seconds, 1),
        ratio=Ratio.of(timings["raw"], timings["ours"]),
    )


def write_raw(data: bytes, path: Path) -> None:
    """Writes the same bytes, syncs them to disk and removes the file."""
    with path.open("wb") as file:
        for start in range(0, len(data), _CHUNK_BYTES):
            file.write(memoryview(data)[start : start + _CHUNK_BYTES])
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


def measure_uploads(workload: Workload, folder: Path, args: argparse.Namespace) -> list[UploadResult]:
    """Every layer in bfloat16, over each link."""
    if not args.link_mb_s:
        return []
    # A run of few windows mostly measures its start and end.
    stream = folder / "copies.jsonl"
    stream.write_text(workload.token_stream.read_text() * args.upload_copies)
    engine = replayed(storage_engine(replace(workload, token_stream=stream), shard_mb=args.upload_shard_mb))
    engine.run(folder / "stored")
    files = sorted((folder / "stored" / engine.job.folder).iterdir())
    return [measure_upload(engine, files, link, args.repeats) for link in args.link_mb_s]


def storage_engine(workload: Workload, *, shard_mb: float) -> Engine:
    """Every layer in bfloat16 to safetensors, whose bytes are those of the arrays."""
    return Engine.load(
        workload.model_path,
        workload.token_stream,
        layers=case_layers("all", load_config(workload.model_path).n_layers),
        dtype="bfloat16",
        batch_size=4,
        shard_mb=shard_mb,
        shard_format="safetensors",
    )


def build_parser() -> argparse_flags.ArgumentParser:
    """The flags of the command."""
    parser = CommandParser(description=__doc__)
    add_workload_flags(parser, prompts=32)
    add = parser.add_argument
    add("--all_prompts", type=positive(int), default=6, help="prompts of the case that stores every layer (default 6)")
    add("--cases", nargs="*", choices=CASES, default=CASES, help="one middle layer or every layer (default both)")
    add("--dtypes", nargs="+", choices=tuple(DTYPES), default=tuple(DTYPES), help="stored dtypes (default all)")
    add("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="formats (default all)")
    add("--codecs", nargs="*", choices=tuple(CODECS), default=tuple(CODECS), help="compressors (default all)")
    add(
        "--link_mb_s",
        nargs="*",
        type=not_negative(float),
        default=[0, 100],
        help="uploads: speeds of the link, 0 for loopback (default 0 100)",
    )
    add("--upload_shard_mb", type=positive(float), default=16, help="uploads: size of a shard (default 16)")
    add(
        "--upload_copies", type=positive(int), default=3, help="uploads: how often the prompts are repeated (default 3)"
    )
    add("--work_dir", type=Path, help="where to write files (default: a temporary folder)")
    add_output_flags(parser, repeats=3)
    return parser


def report(results: Sequence[StorageResult]) -> str:
    """The printed table."""
    header = ["case", "dtype", "way", "ratio", "of entropy", "encode MB/s", "x", "store MB/s", "x", "read MB/s"]
    rows = [
        [
            row.case,
            row.dtype,
            row.way,
            f"{row.ratio:.3f}",
            f"{row.ratio / result.entropy_ratio:.2f}",
            _shown(row.encode),
            _shown(row.encode_speedup, 1),
            _shown(row.store),
            _shown(row.store_speedup, 1),
            _shown(row.read),
        ]
        for result in results
        for row in result.rows
    ]
    return table(header, rows)


def _shown(number: float | None, digits: int = 0) -> str:
    return "" if number is None else f"{number:.{digits}f}"


def report_io(disk: DiskResult, uploads: Sequence[UploadResult]) -> str:
    """The table of disk and bucket."""
    rows: list[list[object]] = [["disk, safetensors", disk.raw_mb_s, disk.ours_mb_s, disk.ratio]]
    for upload in uploads:
        link = f"{upload.link_mb_s:.0f} MB/s" if upload.link_mb_s else "loopback"
        rows.append([f"bucket, link {link}", upload.raw_mb_s, upload.run_mb_s, upload.ratio])
    notes = [
        f"{upload.link_mb_s:.0f} MB/s: busy cores {busy(upload.raw_busy)}, in the run {busy(upload.run_busy)}; "
        f"CPU time alone would allow {upload.cpu_allows:.2f}"
        for upload in uploads
    ]
    return "\n".join([table(["where", "raw MB/s", "ours MB/s", "share (rounds)"], rows), *notes])


def busy(cores: Busy) -> str:
    """As text."""
    return f"{cores.ours:.2f} + {cores.server:.2f} of the server"


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    with tempfile.TemporaryDirectory(prefix="storage_", dir=args.work_dir) as scratch:
        folder = Path(scratch)
        workload = workload_of(args, folder / "workload")
        few = build_workload(
            folder / "few", prompts=args.all_prompts, seed=args.seed, source=args.source, model_path=args.model_path
        )
        by_case = {"middle": workload, "all": few}
        results = [result for case in args.cases for result in measure_case(case, by_case[case], folder, args)]
        disk = measure_disk(few, folder, args.repeats)
        uploads = measure_uploads(few, folder, args)
    if args.json:
        found: dict[str, Any] = {"machine": machine(), "workload": workload.spread()}
        found |= {"cases": [asdict(result) for result in results], "disk": asdict(disk)}
        print(json.dumps(found | {"uploads": [asdict(result) for result in uploads]}))
        return
    print(report(results))
    print(report_io(disk, uploads))
    for result in results:
        scaling = "; ".join(f"{way} {rates}" for way, rates in result.cores.items())
        note = f"{result.case} {result.dtype}: {result.bytes} bytes, ratio by entropy {result.entropy_ratio}"
        print(f"{note}; MB/s by threads: {scaling}", file=sys.stderr)


def main() -> None:
    """The console command."""
    run_command(run, build_parser)
