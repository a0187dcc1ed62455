import gzip
import hashlib
import io
import os
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import pytest

from core.object_store import sinks
from core.object_store.sinks import DigestWriter, ParallelGzipWriter, WriteBehind, digest_stream


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(sinks, "BLOCK_BYTES", 1000)


def compress(data: bytes, threads: int, piece: int) -> bytes:
    out = io.BytesIO()
    with ThreadPoolExecutor(threads) as pool:
        writer = ParallelGzipWriter(out, pool, in_flight=2)
        for start in range(0, len(data), piece):
            writer.write(data[start : start + piece])
        writer.close()
    return out.getvalue()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 12345])
def test_gzip_and_zcat_read_what_was_written(small_blocks, size, tmp_path):
    data = np.random.default_rng(size).bytes(size)
    compressed = compress(data, threads=3, piece=333)
    assert gzip.decompress(compressed) == data
    (tmp_path / "x.gz").write_bytes(compressed)
    assert subprocess.run(["zcat", tmp_path / "x.gz"], capture_output=True, check=True).stdout == data


def test_the_whole_file_is_one_gzip_member(small_blocks):
    compressed = compress(np.random.default_rng(0).bytes(50_000), threads=2, piece=999)
    reader = zlib.decompressobj(wbits=31)
    reader.decompress(compressed)
    assert reader.eof
    assert reader.unused_data == b""


def test_the_bytes_depend_on_neither_threads_nor_write_sizes(small_blocks):
    data = np.random.default_rng(0).bytes(50_000)
    assert compress(data, 1, 50_000) == compress(data, 4, 77) == compress(data, 2, 1000)


def test_a_digest_is_that_of_the_bytes_that_passed():
    data = np.random.default_rng(0).bytes(9_000_000)
    sink = io.BytesIO()
    writer = DigestWriter(sink)
    writer.write(data[:5])
    writer.write(memoryview(data)[5:])
    digest = writer.digest()
    assert sink.getvalue() == data
    assert digest.bytes == len(data)
    assert digest.sha256 == hashlib.sha256(data).hexdigest()
    assert digest.crc32c == f"{google_crc32c.value(data):08x}"
    assert digest_stream(io.BytesIO(data)) == digest


def test_writing_behind_keeps_order_and_finishes_before_it_ends():
    sink, data = io.BytesIO(), np.random.default_rng(0).bytes(10_000)
    with WriteBehind(sink, in_flight=2) as behind:
        for start in range(0, len(data), 7):
            behind.write(memoryview(data)[start : start + 7])
    assert sink.getvalue() == data


def test_an_eager_file_is_synced_as_it_grows(tmp_path, monkeypatch):
    synced: list[int] = []
    monkeypatch.setattr(sinks, "_SYNC_BYTES", 100)
    monkeypatch.setattr(sinks.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    with (tmp_path / "x").open("wb") as raw:
        eager = sinks.EagerFile(raw)
        for _ in range(7):
            assert eager.write(bytes(40)) == 40
    assert synced == [120, 240]
    assert (tmp_path / "x").read_bytes() == bytes(280)


def test_an_error_of_the_sink_reaches_the_writer():
    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), WriteBehind(Full()) as behind:
        behind.write(b"1")


def test_a_block_is_not_copied_before_it_is_compressed(small_blocks):
    data = bytes(5_000)
    with ThreadPoolExecutor(1) as pool:
        writer = ParallelGzipWriter(io.BytesIO(), pool)
        writer.write(data[:1])
        writer.write(data)
        assert {piece.obj is data for piece in writer._block} == {True}
        writer.close()
