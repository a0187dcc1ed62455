"""From the activations of a window to finished files on the local disk: the shard of each site and the sample table."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from core.base.fault_points import fault_point
from core.object_store import LocalStore, disk_errors
from core.object_store.sinks import DigestWriter, EagerFile, FileDigest, ParallelGzipWriter, Sink, WriteBehind
from core.samples.selection import dropped_ranges
from core.samples.windows import TokenizedSample
from core.shards.formats import Outline, ShardFormat, read_shard
from core.shards.names import site_file_name, table_name
from core.shards.window_activations import WindowActivations


@dataclass(frozen=True)
class SpooledFile:
    """A finished file on the local disk, waiting to be stored under `name` in the worker's folder.

    `is_equivalent` tells whether another file's stream holds the same samples up to rounding; None when rounding cannot
    touch the content, so that any other file is a wrong one.
    """

    name: str
    site: str | None
    path: Path
    digest: FileDigest
    is_equivalent: Callable[[BinaryIO], bool] | None


@dataclass(frozen=True)
class ShardEncoder:
    """Writes the files of a window.

    Attributes:
      spool: where the files are written.
      folder: the worker's folder below it.
      gzipped: whether shard files are compressed.
      executor: the threads that compress.
      syncs: whether the files stay on this disk, rather than being read back once for an upload.
    """

    shard_format: ShardFormat
    gzipped: bool
    spool: LocalStore
    folder: str
    executor: Executor
    syncs: bool = False

    @property
    def suffix(self) -> str:
        """The ending of a shard file's name."""
        return self.shard_format.suffix + (".gz" if self.gzipped else "")

    def encode(self, activations: WindowActivations) -> list[SpooledFile]:
        """Writes one file a site and the sample table; what was written is removed again when one of them fails.

        A part of a window that holds no sample has no files.
        """
        window = activations.window
        files: list[SpooledFile] = []
        if not window.samples:
            return files
        try:
            for site in activations.layers:
                content = activations.content(site)
                name = site_file_name(window.index, site, tuple(activations.layers), self.suffix, activations.part)
                fill = partial(self.shard_format.write, content, executor=self.executor)
                path, digest = self._write(name, self.gzipped, fill)
                is_equivalent = partial(_holds, content.outline(), self.shard_format.name, self.gzipped)
                files.append(SpooledFile(name, site, path, digest, is_equivalent))
            name = table_name(window.index, activations.part)
            path, digest = self._write(name, True, partial(write_table, window.samples))
            files.append(SpooledFile(name, None, path, digest, is_equivalent=None))
        except BaseException:
            for file in files:
                file.path.unlink(missing_ok=True)
            raise
        return files

    def _write(self, name: str, gzipped: bool, fill: Callable[[Sink], None]) -> tuple[Path, FileDigest]:
        path = self.spool.temporary_path(f"{self.folder}/{name}")
        try:
            with disk_errors(path), path.open("wb") as raw:
                file_sink = EagerFile(raw) if self.syncs else raw
                with WriteBehind(file_sink) as file, WriteBehind(digest := DigestWriter(file)) as sink:
                    if gzipped:
                        compressor = ParallelGzipWriter(sink, self.executor)
                        fill(compressor)
                        compressor.close()
                    else:
                        fill(sink)
            fault_point("encode.after")
            return path, digest.digest()
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _holds(outline: Outline, format_name: str, gzipped: bool, stream: BinaryIO) -> bool:
    try:
        return read_shard(stream, format_name, gzipped=gzipped).outline() == outline
    except ValueError:
        return False


def write_table(samples: Sequence[TokenizedSample], sink: Sink) -> None:
    """Writes the sample table: a JSON line for each sample, in the order of the shard."""
    for sample in samples:
        sink.write((json.dumps(table_row(sample), ensure_ascii=False, sort_keys=True) + "\n").encode())


def table_row(sample: TokenizedSample) -> dict[str, Any]:
    """What the sample table keeps of a sample; `dropped` is there where tokens are left out."""
    row = {
        "sample_idx": sample.sample_idx,
        "n_tokens": sample.n_stored,
        "full_length": sample.full_length,
        "token_ids": sample.token_ids.tolist(),
        "text_preview": sample.text_preview,
        "labels": sample.labels,
    }
    return row if sample.reasons is None else row | {"dropped": dropped_ranges(sample.reasons)}
