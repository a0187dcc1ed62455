"""Ranges of bytes: the same from a disk and from a bucket, whatever the network does."""

import os
import time

import google_crc32c
import numpy as np
import pytest
from fake_gcs import Reset, Status, TruncateBody

from core.base.errors import ModelError
from qwen2_jax.checkpoints import files
from qwen2_jax.checkpoints.files import LocalFile, RemoteFile, cache_folder, files_below, remote_files, replace_file

CONTENT = np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes()
CRC32C = f"{google_crc32c.value(CONTENT):08x}"


def put(server, name, data=CONTENT):
    server.state.insert("bucket", {"name": name}, data, {})


@pytest.fixture
def stored(bucket):
    put(bucket, "model/x.bin")
    return remote_files("gs://bucket/model")["x.bin"]


@pytest.fixture(params=["local", "gs"])
def file(request, tmp_path):
    if request.param == "gs":
        return request.getfixturevalue("stored")
    (tmp_path / "x.bin").write_bytes(CONTENT)
    return LocalFile.of(tmp_path / "x.bin")


@pytest.fixture
def no_waiting(monkeypatch):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (17, 4711), (99_999, 100_000), (0, 100_000)])
def test_a_range_is_those_bytes(start, stop, file):
    assert file.read(start, stop).tobytes() == CONTENT[start:stop]
    assert (file.name, file.size) == ("x.bin", len(CONTENT))


def test_bytes_behind_the_end_are_an_error(file):
    with pytest.raises(ModelError, match=r"x\.bin: ends before byte 100001; download it again"):
        file.read(50, len(CONTENT) + 1)


def test_the_checksum_is_that_of_the_bytes(file):
    assert file.crc32c() == CRC32C


def test_the_checksum_of_an_object_is_not_read_but_asked_for(stored, bucket):
    assert stored.crc32c() == CRC32C
    assert bucket.count("object.media") == 0


FAULTS = {"503": Status(503), "429": Status(429), "reset": Reset(), "half the body": TruncateBody()}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_passing_fault_of_the_network_is_waited_out(fault, stored, bucket, no_waiting):
    bucket.faults.add("object.media", fault, times=2)
    assert stored.read(5, 50_000).tobytes() == CONTENT[5:50_000]
    assert bucket.faults.taken == 2


class FlakyFileSystem:
    """What fsspec asks of a file system; its answers are given beforehand."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def cat_file(self, name, start, stop):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return CONTENT[start:stop][:answer]


def flaky(*answers):
    return RemoteFile(FlakyFileSystem(*answers), "s3", {"name": "bucket/x.bin", "size": len(CONTENT)})


def test_what_no_library_repeats_is_repeated(no_waiting):
    """A time-out, and fewer bytes than were asked for."""
    file = flaky(TimeoutError(), 10, ConnectionResetError(), None)
    assert file.read(5, 500).tobytes() == CONTENT[5:500]
    assert len(no_waiting) == 3
    assert 0 < no_waiting[0] < no_waiting[2] < 20


def test_patience_ends(no_waiting):
    with pytest.raises(ModelError, match=r"^s3://bucket/x\.bin: cannot be read \(TimeoutError\)$"):
        flaky(*[TimeoutError()] * 99).read(5, 500)
    assert len(no_waiting) < 10


@pytest.mark.parametrize("error", [PermissionError("denied"), ValueError("no such option")])
def test_what_will_not_pass_is_not_repeated(error, no_waiting):
    with pytest.raises(ModelError, match=str(error)):
        flaky(error, None).read(5, 500)
    assert not no_waiting


@pytest.mark.parametrize("code", [401, 403])
def test_a_refusal_is_one_line_and_not_repeated(code, stored, bucket, no_waiting):
    bucket.faults.add("object.media", Status(code), times=None)
    with pytest.raises(ModelError, match=r"^gs://bucket/model/x\.bin: cannot be read \(.+\)$") as refusal:
        stored.read(0, 10)
    assert "\n" not in str(refusal.value)
    assert not no_waiting


def test_an_object_replaced_since_it_was_listed_is_not_mixed_with_the_new_one(stored, bucket):
    put(bucket, "model/x.bin", CONTENT[::-1])
    with pytest.raises(ModelError, match=r"x\.bin: no such folder or file, or it was replaced while it was read"):
        stored.read(0, 10)


def test_a_folder_that_is_not_there_is_named(bucket):
    with pytest.raises(ModelError, match=r"^gs://bucket/nowhere: no such folder or file"):
        remote_files("gs://bucket/nowhere")


def test_an_unknown_protocol_is_one_line():
    with pytest.raises(ModelError, match=r"^nosuch://x: .*; use a local folder, a hub id or a gs:// URL$"):
        remote_files("nosuch://x")


def test_an_emulator_far_away_is_refused(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.example.com")
    remote_files.cache_clear()
    with pytest.raises(ModelError, match="plain http is for loopback only"):
        remote_files("gs://bucket/model")


def test_a_copy_is_compared_with_the_checksum(stored, bucket, tmp_path):
    stored.copy_to(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT
    bucket.corrupt("model/x.bin", 4711)
    with pytest.raises(ModelError, match="its bytes do not match its checksum"):
        stored.copy_to(tmp_path / "copy")


@pytest.fixture
def small_is_large(home, monkeypatch):
    monkeypatch.setattr(files, "_LARGE", 1000)


def count_reads(monkeypatch):
    reads = []
    compute = LocalFile._compute_crc32c
    monkeypatch.setattr(LocalFile, "_compute_crc32c", lambda file: reads.append(file) or compute(file))
    return reads


def test_a_large_file_is_read_for_its_checksum_once_and_again_when_it_changes(tmp_path, small_is_large, monkeypatch):
    path, reads, now = tmp_path / "x.bin", count_reads(monkeypatch), time.time_ns()
    path.write_bytes(CONTENT)
    monkeypatch.setattr(time, "time_ns", lambda: now + 3_600_000_000_000)
    assert [LocalFile.of(path).crc32c() for _ in range(3)] == [CRC32C] * 3
    assert len(reads) == 1
    stat = path.stat()
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a time stamp may be set back, that of the change may not
    assert LocalFile.of(path).crc32c() == f"{google_crc32c.value(CONTENT[::-1]):08x}"
    assert len(reads) == 2


def test_the_checksum_of_a_file_that_just_changed_is_not_kept(tmp_path, small_is_large, monkeypatch):
    path, reads = tmp_path / "x.bin", count_reads(monkeypatch)
    for content in (CONTENT, CONTENT[::-1]):
        path.write_bytes(content)
        assert LocalFile.of(path).crc32c() == f"{google_crc32c.value(content):08x}"
    assert len(reads) == 2
    assert not cache_folder("checksums").exists()


def test_a_kept_checksum_that_is_damaged_is_computed_again(tmp_path, small_is_large, monkeypatch):
    path, reads, now = tmp_path / "x.bin", count_reads(monkeypatch), time.time_ns()
    path.write_bytes(CONTENT)
    monkeypatch.setattr(time, "time_ns", lambda: now + 3_600_000_000_000)
    LocalFile.of(path).crc32c()
    (kept,) = cache_folder("checksums").iterdir()
    kept.write_text("")
    assert LocalFile.of(path).crc32c() == CRC32C
    assert len(reads) == 2


@pytest.mark.parametrize("place", ["local", "gs://bucket/tree"])
def test_a_tree_of_files_is_listed_as_it_is_now(place, tmp_path, bucket):
    url = str(tmp_path / "tree") if place == "local" else place
    assert files_below(url) == {}
    for name in ("a/b/c", "d"):
        if place == "local":
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(f"{url}/{name}", name.encode())
    replace_file(f"{url}/d", b"again")
    found = {name: file.read(0, file.size).tobytes() for name, file in files_below(url).items()}
    assert found == {"a/b/c": b"a/b/c", "d": b"again"}
