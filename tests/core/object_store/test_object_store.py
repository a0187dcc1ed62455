"""Create-only storage: one winner, nothing half-written, and failures that end in one line or in nothing at all.

The bucket tests drive the real gcsfs over HTTP against the fake service.
"""

import dataclasses
import email.parser
import email.policy
import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_gcs import (
    Call,
    CommitThenReset,
    CommitThenStatus,
    CorruptUpload,
    FakeGcs,
    PersistPart,
    Reset,
    Stall,
    Status,
    TruncateBody,
    api,
    gcs_environment,
)
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.base.errors import RunError, UsageError
from core.object_store import (
    Created,
    LocalStore,
    ObjectInfo,
    ObjectStore,
    RetryPolicy,
    bytes_info,
    file_info,
    open_store,
)

QUICK = RetryPolicy(base_s=0.002, cap_s=0.02, connect_timeout_s=2.0, read_timeout_s=2.0, write_timeout_s=5.0)
ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with FakeGcs() as fake:
        for key, value in gcs_environment(fake).items():
            monkeypatch.setenv(key, value)
        yield fake


@pytest.fixture
def bucket(server: FakeGcs) -> ObjectStore:
    return open_store("gs://bucket/run", QUICK)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "out")


@pytest.fixture(params=["local", "memory", "gs"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "local":
        return open_store(f"file://{tmp_path}/out")
    if request.param == "memory":
        return open_store(f"memory://{tmp_path.name}-{time.monotonic_ns()}/out")
    request.getfixturevalue("server")
    return open_store("gs://bucket/run/", QUICK)


def files_under(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def race(writers: int, write: Callable[[int], Created]) -> list[Created]:
    barrier = threading.Barrier(writers)

    def run(index: int) -> Created:
        barrier.wait()
        return write(index)

    with ThreadPoolExecutor(writers) as pool:
        return list(pool.map(run, range(writers)))


# What every store promises


def test_crc32c_is_the_castagnoli_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"123456789")
    assert file_info(path) == bytes_info(b"123456789") == ObjectInfo(9, "e3069283")
    path.write_bytes(b"")
    assert file_info(path) == ObjectInfo(0, "00000000")


def test_what_is_created_can_be_read_back_in_every_way(store: ObjectStore, tmp_path: Path) -> None:
    data = random.Random(0).randbytes(300_000)
    assert not store.url.endswith("/")
    assert store.create_bytes("tpu_0/a b#%é.json", data) is Created.CREATED
    source = tmp_path / "finished"
    source.write_bytes(data)
    assert store.create_file("tpu_0/shard_0001.pkl.gz", source, file_info(source)) is Created.CREATED
    assert source.read_bytes() == data
    for name in ("tpu_0/a b#%é.json", "tpu_0/shard_0001.pkl.gz"):
        assert store.read_bytes(name) == data
        assert store.info(name) == bytes_info(data)
        with store.open(name) as file:
            assert file.read(10) == data[:10]
            file.seek(-5, 2)
            assert file.read() == data[-5:]
            file.seek(1000)
            assert file.read() == data[1000:]


def test_the_second_writer_learns_whether_it_agrees_and_changes_nothing(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "finished"
    source.write_bytes(b"one")
    assert store.create_bytes("x", b"one") is Created.CREATED
    assert store.create_bytes("x", b"one") is Created.ALREADY_SAME
    assert store.create_bytes("x", b"two") is Created.ALREADY_DIFFERENT
    assert store.create_file("x", source, bytes_info(b"one")) is Created.ALREADY_SAME
    source.write_bytes(b"three")
    assert store.create_file("x", source, bytes_info(b"three")) is Created.ALREADY_DIFFERENT
    assert store.read_bytes("x") == b"one"


def test_replace_overwrites_and_delete_removes_also_what_is_not_there(store: ObjectStore) -> None:
    store.replace_bytes("metadata.json", b"1")
    store.replace_bytes("metadata.json", b"22")
    assert store.read_bytes("metadata.json") == b"22"
    store.delete("metadata.json")
    store.delete("metadata.json")
    assert store.list() == []


def test_absent_objects_are_none_or_file_not_found(store: ObjectStore) -> None:
    store.create_bytes("folder/x", b"")
    for name in ("none", "folder"):
        if name == "none" or not isinstance(store, LocalStore):
            assert store.info(name) is None
            with pytest.raises(FileNotFoundError):
                store.read_bytes(name)
            with pytest.raises(FileNotFoundError):
                store.open(name)


def test_an_empty_object_is_an_object(store: ObjectStore, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert store.create_bytes("a", b"") is Created.CREATED
    assert store.create_file("b", empty, file_info(empty)) is Created.CREATED
    assert store.info("a") == store.info("b") == ObjectInfo(0, "00000000")
    assert store.read_bytes("a") == store.open("b").read() == b""


def test_listing_is_sorted_recursive_by_prefix_and_fresh(store: ObjectStore) -> None:
    assert store.list() == []
    for name in ("tpu_1/b", "tpu_0/shard_0002", "tpu_0/shard_0001", "run.json", "tpu_10/x"):
        store.create_bytes(name, b"")
    assert store.list() == ["run.json", "tpu_0/shard_0001", "tpu_0/shard_0002", "tpu_1/b", "tpu_10/x"]
    assert store.list("tpu_1") == ["tpu_1/b", "tpu_10/x"]
    assert store.list("tpu_0/shard_") == ["tpu_0/shard_0001", "tpu_0/shard_0002"]
    assert store.list("none/") == []
    store.delete("tpu_0/shard_0001")
    store.create_bytes("tpu_0/shard_0003", b"")
    assert store.list("tpu_0/") == ["tpu_0/shard_0002", "tpu_0/shard_0003"]


def test_a_listing_says_how_large_and_how_old_each_object_is_by_the_storages_clock(store: ObjectStore) -> None:
    store.create_bytes("a/b.json", b"12345")
    time.sleep(0.01)
    store.create_bytes("a/c.json", b"")
    listing = store.listing("a/")
    assert [(entry.name, entry.size) for entry in listing.entries] == [("a/b.json", 5), ("a/c.json", 0)]
    first, second = (entry.modified for entry in listing.entries)
    assert first <= second
    # A bucket says the time of its reply in whole seconds.
    assert -1.0 <= listing.now - second < 60
    assert store.listing("nothing/").entries == ()


def test_a_listing_gives_what_is_written_again_another_version_and_what_is_not_the_same(store: ObjectStore) -> None:
    store.create_bytes("created", b"1")
    seen = []
    for _ in range(20):
        store.replace_bytes("replaced", b"the same")
        time.sleep(0.005)
        seen.append({entry.name: entry.version for entry in store.listing().entries})
    assert len({versions["replaced"] for versions in seen}) == 20
    assert len({versions["created"] for versions in seen}) == 1


def test_a_folder_that_cannot_be_read_is_no_empty_folder(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission bits stop."""
    local.create_bytes("a/b", b"")
    local.create_bytes("c/d", b"")
    real = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "a":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for look in (local.list, local.listing):
        with pytest.raises(RunError, match=r"/a: cannot be listed: Permission denied"):
            look()
    assert local.list("c/") == ["c/d"]
    assert local.remove_stale_temporaries() == ()


def test_two_stores_of_a_process_never_share_a_temporary_name(local: LocalStore) -> None:
    other = LocalStore(local.root)
    assert local.temporary_path("a") != other.temporary_path("a")


@pytest.mark.parametrize("name", ["", "/x", "a//b", "../x", "a/../../x", "a/", "./a", "a\0"])
def test_a_name_cannot_leave_the_store(store: ObjectStore, name: str) -> None:
    with pytest.raises(ValueError, match="not an object name"):
        store.create_bytes(name, b"")
    with pytest.raises(ValueError, match="not an object name"):
        store.read_bytes(name)


def test_create_only_races_have_one_winner_and_the_winner_stands(store: ObjectStore) -> None:
    for name in ("claims/0", "claims/1", "claims/2"):
        outcomes = race(16, lambda i, name=name: store.create_bytes(name, b"writer %d" % i))
        assert outcomes.count(Created.CREATED) == 1
        assert outcomes.count(Created.ALREADY_DIFFERENT) == 15
        assert store.read_bytes(name) == b"writer %d" % outcomes.index(Created.CREATED)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["create", "replace", "delete", "read"]), st.sampled_from("abc"), st.binary(max_size=3)
        ),
        max_size=12,
    )
)
def test_any_sequence_of_calls_agrees_with_a_dictionary(tmp_path: Path, steps: list[tuple[str, str, bytes]]) -> None:
    model: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        store = LocalStore(folder)
        for step, name, data in steps:
            if step == "create":
                same = model.setdefault(name, data) == data
                outcome = store.create_bytes(name, data)
                assert (outcome is Created.ALREADY_DIFFERENT) == (not same)
            elif step == "replace":
                store.replace_bytes(name, data)
                model[name] = data
            elif step == "delete":
                store.delete(name)
                model.pop(name, None)
            assert files_under(Path(folder)) == model
            assert store.list() == sorted(model)


def test_a_memory_race_has_one_winner_even_when_looking_takes_time(monkeypatch: pytest.MonkeyPatch) -> None:
    real_exists = MemoryFileSystem.exists

    def slowly(self: MemoryFileSystem, path: str) -> bool:
        found = real_exists(self, path)
        time.sleep(0.01)
        return found

    store = open_store(f"memory://slow-{time.monotonic_ns()}")
    monkeypatch.setattr(MemoryFileSystem, "exists", slowly)
    outcomes = race(8, lambda i: store.create_bytes("x", b"%d" % i))
    assert outcomes.count(Created.CREATED) == 1


# URLs


def test_urls_choose_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("out/").url == str(tmp_path / "out")
    assert open_store(f"file://{tmp_path}/out/").url == str(tmp_path / "out")
    assert open_store(".").list() == []
    assert (open_store("out").free_bytes() or 0) > 0
    assert open_store("memory://x/y").free_bytes() is None


@pytest.mark.parametrize("url", ["gs://", "gs:///x", "gs://UPPER/x", "gs://b/x", "nosuch://b/x"])
def test_an_unusable_url_is_a_usage_error_that_names_it(url: str) -> None:
    with pytest.raises(UsageError, match=re.escape(url)):
        open_store(url)


def test_a_file_system_without_exclusive_creation_is_read_only(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"data")
    store = open_store(f"simplecache::file://{tmp_path}")
    assert store.read_bytes("x") == b"data"
    for write in (store.create_bytes, store.replace_bytes):
        with pytest.raises(RunError, match="cannot be created exclusively"):
            write("y", b"")


def test_plain_http_is_accepted_for_loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.example.com")
    with pytest.raises(UsageError, match="loopback"):
        open_store("gs://bucket/x")


def test_missing_credentials_are_one_line_with_the_command_to_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for key in ("STORAGE_EMULATOR_HOST", "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    with pytest.raises(RunError, match="gcloud auth application-default login") as caught:
        open_store("gs://bucket/x")
    assert "\n" not in str(caught.value)


def test_importing_the_module_loads_no_client_library() -> None:
    code = "import sys, core.object_store; print(sorted({'gcsfs', 'fsspec', 'aiohttp', 'asyncio'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Local disk


def test_a_file_written_at_its_temporary_path_is_linked_not_copied(local: LocalStore) -> None:
    temporary = local.temporary_path("tpu_0/shard_0001.pkl.gz")
    temporary.write_bytes(b"data")
    inode = temporary.stat().st_ino
    assert local.list() == []
    assert local.create_file("tpu_0/shard_0001.pkl.gz", temporary, bytes_info(b"data")) is Created.CREATED
    assert (local.root / "tpu_0/shard_0001.pkl.gz").stat().st_ino == inode
    assert files_under(local.root) == {"tpu_0/shard_0001.pkl.gz": b"data"}


def test_any_other_file_is_copied_so_that_changing_it_changes_nothing_committed(
    local: LocalStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    local.create_file("x", source, bytes_info(b"data"))
    source.write_bytes(b"else")
    assert local.read_bytes("x") == b"data"


def test_a_loser_drops_its_temporary_file_and_keeps_what_stands(local: LocalStore) -> None:
    local.create_bytes("x", b"first")
    temporary = local.temporary_path("x")
    temporary.write_bytes(b"second")
    assert local.create_file("x", temporary, bytes_info(b"second")) is Created.ALREADY_DIFFERENT
    assert files_under(local.root) == {"x": b"first"}


def test_a_file_that_is_not_what_was_written_is_refused(store: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"shor")
    with pytest.raises(RunError, match="source"):
        store.create_file("x", source, bytes_info(b"short"))
    with pytest.raises(FileNotFoundError):
        store.create_file("x", tmp_path / "none", bytes_info(b"short"))
    assert store.list() == []


def test_thirty_two_threads_race_for_a_file_and_one_wins(local: LocalStore) -> None:
    def write(index: int) -> Created:
        temporary = local.temporary_path("x")
        temporary.write_bytes(b"%02d" % index)
        return local.create_file("x", temporary, bytes_info(b"%02d" % index))

    outcomes = race(32, write)
    assert outcomes.count(Created.CREATED) == 1
    assert files_under(local.root) == {"x": b"%02d" % outcomes.index(Created.CREATED)}


def _claim(folder: str, worker: int, rounds: int) -> list[str]:
    store = open_store(folder)
    outcomes = []
    for number in range(rounds):
        # Meet at each round: whoever comes first waits for the others' marks.
        store.create_bytes(f"ready/{number}/{worker}", b"")
        while len(store.list(f"ready/{number}/")) < 3:
            time.sleep(0.001)
        outcomes.append(store.create_bytes(f"claims/{number}", b"%d" % worker).value)
    return outcomes


def test_processes_race_and_one_wins_each_round(local: LocalStore) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        per_worker = pool.starmap(_claim, [(local.url, worker, 10) for worker in range(3)], chunksize=1)
    for number, outcomes in enumerate(zip(*per_worker, strict=True)):
        assert sorted(outcomes) == ["already different", "already different", "created"]
        assert local.read_bytes(f"claims/{number}") == b"%d" % outcomes.index("created")


@pytest.mark.parametrize("way", ["bytes", "file", "copy"])
def test_nobody_sees_half_of_a_file(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    data, seen, done = b"x" * 200_000, set(), threading.Event()
    final = local.root / "a/x"

    def watch() -> None:
        while not done.is_set():
            if final.exists():
                seen.add(final.read_bytes())
                assert local.list() == ["a/x"]

    def slowly(descriptor: int) -> None:
        time.sleep(0.05)

    monkeypatch.setattr(os, "fsync", slowly)
    watcher = threading.Thread(target=watch)
    watcher.start()
    source = local.temporary_path("a/x") if way == "file" else tmp_path / "source"
    with open(source, "wb") as file:
        for start in range(0, len(data), 50_000):
            file.write(data[start : start + 50_000])
            file.flush()
            time.sleep(0.01)
    if way == "bytes":
        local.create_bytes("a/x", data)
    else:
        local.create_file("a/x", source, bytes_info(data))
    time.sleep(0.02)
    done.set()
    watcher.join()
    assert seen == {data}


def test_the_data_is_synced_before_its_name_appears_and_the_folder_after(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    local.create_bytes("first", b"")
    events: list[str] = []
    real_link, real_sync = os.link, os.fsync

    def link(source: Path, target: Path) -> None:
        events.append("link")
        real_link(source, target)

    def fsync(descriptor: int) -> None:
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync file")
        real_sync(descriptor)

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "fsync", fsync)
    local.create_bytes("x", b"data")
    assert events == ["sync file", "link", "sync folder"]


def test_only_the_temporary_files_of_dead_processes_of_this_host_are_removed(local: LocalStore) -> None:
    code = (
        "import sys, time; from core.object_store import LocalStore; "
        "print(LocalStore(sys.argv[1]).temporary_path('a/x.npz'), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, local.url]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        theirs = Path(child.stdout.readline().strip())
        try:
            theirs.write_bytes(b"half")
            local.create_bytes("a/x.npz", b"data")
            mine = local.temporary_path("b")
            mine.write_bytes(b"half")
            other_host = Path(str(theirs).replace(socket.gethostname(), "elsewhere"))
            other_host.write_bytes(b"half")
            assert theirs.suffix == ".npz"
            assert local.remove_stale_temporaries() == ()
        finally:
            child.kill()
    assert local.list() == ["a/x.npz"]
    assert local.remove_stale_temporaries() == (theirs,)
    assert set(files_under(local.root).values()) == {b"data", b"half"}
    mine.unlink()
    other_host.unlink()
    assert files_under(local.root) == {"a/x.npz": b"data"}


def test_a_reused_process_id_does_not_keep_a_dead_process_alive(local: LocalStore) -> None:
    mine = local.temporary_path("x")
    pid, start = mine.name.split("~")[3:5]
    recycled = mine.with_name(mine.name.replace(f"~{pid}~{start}~", f"~{pid}~{int(start) - 1}~"))
    recycled.touch()
    mine.touch()
    assert local.remove_stale_temporaries() == (recycled,)


def _full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("broken", ["write_bytes", "fsync", "copyfile"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"data")
    local.create_bytes("before", b"1")
    owner = {"write_bytes": Path, "fsync": os, "copyfile": shutil}[broken]
    monkeypatch.setattr(owner, broken, _full)
    write = local.create_bytes if broken == "write_bytes" else local.create_file
    arguments = (b"data",) if broken == "write_bytes" else (source, bytes_info(b"data"))
    with pytest.raises(RunError, match=r"^disk full: .*out/x.*resume$"):
        write("x", *arguments)
    monkeypatch.undo()
    assert files_under(local.root) == {"before": b"1"}


def test_a_full_disk_on_commit_removes_the_temporary_file(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = local.temporary_path("x")
    temporary.write_bytes(b"data")
    monkeypatch.setattr(os, "link", _full)
    with pytest.raises(RunError, match="disk full"):
        local.create_file("x", temporary, bytes_info(b"data"))
    assert files_under(local.root) == {}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot write .*file/out/x: "):
        LocalStore(tmp_path / "file/out").create_bytes("x", b"")


def test_without_hard_links_an_exclusive_rename_does_the_same(
    local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    outcomes = race(8, lambda i: local.create_bytes("x", b"%d" % i))
    assert outcomes.count(Created.CREATED) == 1
    assert files_under(local.root) == {"x": b"%d" % outcomes.index(Created.CREATED)}


def test_a_filesystem_that_can_do_neither_is_refused(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: object())
    with pytest.raises(RunError, match="neither hard links nor exclusive rename"):
        local.create_bytes("x", b"data")
    assert files_under(local.root) == {}


def test_a_lost_reply_of_a_link_is_recognised_by_the_inode(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real_link = os.link

    def link_twice(source: Path, target: Path) -> None:
        real_link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link_twice)
    assert local.create_bytes("x", b"data") is Created.CREATED


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second filesystem")
@pytest.mark.parametrize("temporary", [True, False])
def test_a_file_from_another_filesystem_is_copied_first(local: LocalStore, temporary: bool) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        source = LocalStore(folder).temporary_path("x") if temporary else Path(folder, "x")
        source.write_bytes(b"data" * 1000)
        assert local.create_file("a/x", source, file_info(source)) is Created.CREATED
        assert source.exists() is not temporary
    assert files_under(local.root) == {"a/x": b"data" * 1000}


# Bucket


def test_objects_lie_under_the_prefix_and_nothing_else_is_listed(server: FakeGcs, bucket: ObjectStore) -> None:
    bucket.create_bytes("a", b"1")
    open_store("gs://bucket/run2", QUICK).create_bytes("b", b"2")
    assert server.objects() == {"run/a": b"1", "run2/b": b"2"}
    assert bucket.list() == ["a"]
    assert open_store("gs://bucket", QUICK).list() == ["run/a", "run2/b"]


@pytest.mark.parametrize("fault", [CommitThenStatus(503), CommitThenReset()])
@pytest.mark.parametrize("size", [10, 9 << 20])
def test_a_lost_acknowledgement_is_recognised_as_our_own_write(
    server: FakeGcs, bucket: ObjectStore, tmp_path: Path, fault: CommitThenStatus | CommitThenReset, size: int
) -> None:
    data = random.Random(1).randbytes(size)
    source = tmp_path / "source"
    source.write_bytes(data)
    kind = "upload.multipart" if size == 10 else "upload.chunk"
    server.faults.add(lambda call: call.kind == kind and not server.generations("run/x"), fault, times=2)
    assert bucket.create_file("x", source, file_info(source)) is Created.CREATED
    assert server.objects() == {"run/x": data}
    assert len(server.generations("run/x")) == 1


def test_a_lost_acknowledgement_of_a_loser_stays_a_loss(server: FakeGcs, bucket: ObjectStore) -> None:
    bucket.create_bytes("x", b"first")
    server.faults.add("upload", CommitThenStatus(503))
    assert bucket.create_bytes("x", b"second") is Created.ALREADY_DIFFERENT
    server.faults.add("upload", CommitThenStatus(503))
    assert bucket.create_bytes("x", b"first") is Created.ALREADY_SAME
    assert len(server.generations("run/x")) == 1


@pytest.mark.parametrize("seed", range(3))
def test_everything_finishes_when_thirty_percent_of_requests_fail(server: FakeGcs, tmp_path: Path, seed: int) -> None:
    store = open_store("gs://bucket/run", dataclasses.replace(QUICK, tries=12))
    for number, fault in enumerate((Status(429), Status(503), Reset(), CommitThenStatus(500))):
        server.faults.add(lambda call: True, fault, times=None, probability=0.085, seed=10 * seed + number)
    source = tmp_path / "source"
    source.write_bytes(random.Random(seed).randbytes(9 << 20))
    for number in range(8):
        assert store.create_bytes(f"record/{number}", b"%d" % number) is Created.CREATED
        assert store.create_bytes(f"record/{number}", b"?") is Created.ALREADY_DIFFERENT
    assert store.create_file("shard", source, file_info(source)) is Created.CREATED
    store.replace_bytes("metadata.json", b"{}")
    assert store.list("record/") == [f"record/{number}" for number in range(8)]
    assert [store.read_bytes(f"record/{number}") for number in range(8)] == [b"%d" % n for n in range(8)]
    assert store.open("shard").read() == source.read_bytes()
    store.delete("record/0")
    assert sorted(server.objects()) == sorted(
        ["run/metadata.json", "run/shard", *(f"run/record/{number}" for number in range(1, 8))]
    )
    assert server.faults.taken > 15
    assert all(len(server.generations(name)) == 1 for name in server.objects() if name != "run/metadata.json")


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
def test_a_permanent_failure_is_one_line_after_bounded_tries(server: FakeGcs, bucket: ObjectStore, code: int) -> None:
    server.faults.add("upload", Status(code), times=None)
    begin = time.monotonic()
    with pytest.raises(RunError, match=rf"cannot write gs://bucket/run/x: HTTP {code} on each of 10 tries") as caught:
        bucket.create_bytes("x", b"data")
    assert "\n" not in str(caught.value)
    assert server.count("upload") == 10
    assert time.monotonic() - begin < 5


def test_a_server_that_is_gone_is_one_line_after_bounded_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{unused.getsockname()[1]}")
        store = open_store("gs://bucket/run", QUICK)
        with pytest.raises(RunError, match=r"cannot look up gs://bucket/run/x: .* on each of 10 tries"):
            store.info("x")


@pytest.mark.parametrize(("code", "advice"), [(401, "gcloud auth application-default login"), (403, "Object Admin")])
def test_refusals_are_not_repeated_and_say_what_to_do(
    server: FakeGcs, bucket: ObjectStore, code: int, advice: str
) -> None:
    server.faults.add(lambda call: True, Status(code), times=None)
    calls = (
        lambda: bucket.create_bytes("x", b""),
        lambda: bucket.read_bytes("x"),
        lambda: bucket.info("x"),
        lambda: bucket.list(),
        lambda: bucket.delete("x"),
    )
    for call in calls:
        with pytest.raises(RunError, match=advice) as caught:
            call()
        assert "gs://bucket/run" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert len(server.requests) == len(calls)


def test_a_missing_bucket_is_named(server: FakeGcs) -> None:
    store = open_store("gs://other/run", QUICK)
    for call in (lambda: store.create_bytes("x", b""), lambda: store.list()):
        with pytest.raises(RunError, match="no bucket other"):
            call()


@pytest.mark.parametrize(("kind", "limit"), [("upload", "write_timeout_s"), ("object.get", "read_timeout_s")])
def test_a_stalled_server_is_given_up_and_asked_again(server: FakeGcs, kind: str, limit: str) -> None:
    patient = dataclasses.replace(QUICK, read_timeout_s=30.0, write_timeout_s=30.0)
    changes: dict[str, Any] = {limit: 0.2}
    store = open_store("gs://bucket/run", dataclasses.replace(patient, **changes))
    server.faults.add(kind, Stall(8))
    begin = time.monotonic()
    assert store.create_bytes("x", b"data") is Created.CREATED
    assert time.monotonic() - begin < 6


@pytest.mark.parametrize("way", ["read_bytes", "open"])
def test_a_truncated_download_is_noticed_and_repeated(server: FakeGcs, bucket: ObjectStore, way: str) -> None:
    data = random.Random(2).randbytes(1 << 20)
    bucket.create_bytes("x", data)

    def read() -> bytes:
        return bucket.read_bytes("x") if way == "read_bytes" else bucket.open("x").read()

    server.faults.add("object.media", TruncateBody(0.6), times=2)
    assert read() == data
    server.faults.add("object.media", TruncateBody(0.6), times=None)
    with pytest.raises(RunError, match="cannot read gs://bucket/run/x"):
        read()


def test_damage_at_rest_is_an_error_that_names_the_object(server: FakeGcs, bucket: ObjectStore) -> None:
    bucket.create_bytes("x", b"data")
    server.corrupt("run/x")
    with pytest.raises(RunError, match="gs://bucket/run/x: its bytes do not match"):
        bucket.read_bytes("x")


@pytest.mark.parametrize("size", [4, 9 << 20])
def test_an_upload_damaged_on_the_way_is_never_committed_and_sent_again(
    server: FakeGcs, bucket: ObjectStore, size: int
) -> None:
    server.faults.add("upload", CorruptUpload(1), times=2)
    assert bucket.create_bytes("x", bytes(size)) is Created.CREATED
    assert server.objects() == {"run/x": bytes(size)}
    assert len(server.generations("run/x")) == 1
    server.faults.add("upload", CorruptUpload(1), times=None)
    with pytest.raises(RunError, match="cannot write gs://bucket/run/y: "):
        bucket.create_bytes("y", bytes(size))
    assert not server.generations("run/y")


def test_an_object_of_ours_that_was_stored_damaged_is_removed(server: FakeGcs, bucket: ObjectStore) -> None:
    def damage(call: Call) -> bool:
        found = server.state.buckets["bucket"].get("run/x")
        if call.kind == "object.get" and found:
            server.state.buckets["bucket"]["run/x"] = dataclasses.replace(found, crc32c="AAAAAA==")
        return False

    server.faults.add(damage, Reset())
    with pytest.raises(RunError, match="gs://bucket/run/x was damaged on upload"):
        bucket.create_bytes("x", b"data")
    assert server.objects() == {}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=20) | st.sampled_from([b"\r", b"\r\n", b"\n--==0==--", b"x\r\n--"]))
def test_any_bytes_survive_the_upload(bucket: ObjectStore, data: bytes) -> None:
    bucket.replace_bytes("x", data)
    assert bucket.read_bytes("x") == data


def test_small_uploads_can_be_read_by_a_strict_parser(
    server: FakeGcs, bucket: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bytes]] = []
    real_parse = api.parse_related

    def parse(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes, str | None]:
        seen.append((content_type, body))
        return real_parse(content_type, body)

    monkeypatch.setattr(api, "parse_related", parse)
    bucket.create_bytes("x", b"\x00data")
    ((content_type, body),) = seen
    message = email.parser.BytesParser(policy=email.policy.default).parsebytes(
        b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body
    )
    assert b"\n" not in body.replace(b"\r\n", b"")
    resource, media = (part.get_content() for part in message.iter_parts())
    assert json.loads(resource)["name"] == "run/x"
    assert media == b"\x00data"


def test_an_object_that_may_be_anothers_is_never_deleted(server: FakeGcs, bucket: ObjectStore) -> None:
    class Intruder:
        """Overwrites the object between our upload and our look at it."""

        def __call__(self, call: object) -> bool:
            if getattr(call, "kind", "") == "object.get" and server.objects() == {"run/x": b"mine"}:
                server.state.insert("bucket", {"name": "run/x"}, b"theirs", {})
            return False

    server.faults.add(Intruder(), Reset())
    with pytest.raises(RunError, match="gs://bucket/run/x was replaced during the upload"):
        bucket.create_bytes("x", b"mine")
    assert server.objects() == {"run/x": b"theirs"}
    assert server.count("object.delete") == 0


def test_a_large_upload_goes_in_chunks_and_repeats_only_the_one_that_failed(
    server: FakeGcs, bucket: ObjectStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(3).randbytes(20 << 20))
    server.faults.add(
        lambda call: call.kind == "upload.chunk" and server.count("upload.chunk") == 1, PersistPart(3 << 20, 503)
    )
    assert bucket.create_file("shard", source, file_info(source)) is Created.CREATED
    assert server.count("upload.start") == 1
    assert server.count("upload.chunk") == 4
    assert server.objects() == {"run/shard": source.read_bytes()}


def test_a_short_acknowledgement_is_filled_up(server: FakeGcs, bucket: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(4).randbytes(10 << 20))
    server.faults.add("upload.chunk", PersistPart(1 << 20, 308))
    assert bucket.create_file("shard", source, file_info(source)) is Created.CREATED
    assert server.objects() == {"run/shard": source.read_bytes()}


def test_an_upload_session_that_the_server_forgot_is_started_again(
    server: FakeGcs, bucket: ObjectStore, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.write_bytes(random.Random(5).randbytes(9 << 20))
    server.faults.add("upload.chunk", Status(410))
    assert bucket.create_file("shard", source, file_info(source)) is Created.CREATED
    assert server.count("upload.start") == 2


def test_who_loses_at_the_last_chunk_is_a_loser(server: FakeGcs, bucket: ObjectStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(9 << 20))

    def rival(call: Call) -> bool:
        if call.kind == "upload.chunk":
            server.state.insert("bucket", {"name": "run/shard"}, b"theirs", {})
        return False

    server.faults.add(rival, Reset())
    assert bucket.create_file("shard", source, file_info(source)) is Created.ALREADY_DIFFERENT
    assert server.objects() == {"run/shard": b"theirs"}


def test_an_upload_that_makes_no_progress_ends(server: FakeGcs, bucket: ObjectStore) -> None:
    server.faults.add("upload.chunk", PersistPart(0, 308), times=None)
    with pytest.raises(RunError, match="lost the upload 10 times"):
        bucket.create_bytes("shard", bytes(9 << 20))


def test_a_race_of_large_uploads_has_one_winner(server: FakeGcs, bucket: ObjectStore, tmp_path: Path) -> None:
    sources = [tmp_path / str(index) for index in range(4)]
    for index, source in enumerate(sources):
        source.write_bytes(bytes([index]) * (9 << 20))
    outcomes = race(4, lambda i: bucket.create_file("shard", sources[i], file_info(sources[i])))
    assert sorted(outcome.value for outcome in outcomes) == ["already different"] * 3 + ["created"]
    assert server.objects() == {"run/shard": sources[outcomes.index(Created.CREATED)].read_bytes()}


def test_a_listing_longer_than_a_page_is_complete(server: FakeGcs, bucket: ObjectStore) -> None:
    for number in range(2100):
        server.state.insert("bucket", {"name": f"run/{number:05d}"}, b"", {})
    server.state.insert("bucket", {"name": "run/folder/"}, b"", {})
    assert bucket.list() == [f"{number:05d}" for number in range(2100)]
    assert server.count("object.list") == 3


def test_a_stream_reads_ranges_of_one_generation(server: FakeGcs, bucket: ObjectStore) -> None:
    data = random.Random(6).randbytes(20 << 20)
    server.state.insert("bucket", {"name": "run/x"}, data, {})
    with bucket.open("x") as file:
        assert file.read(100) == data[:100]
        file.seek(10 << 20)
        assert file.read(5) == data[10 << 20 : (10 << 20) + 5]
    assert server.count("object.media") == 2
    with bucket.open("x") as file:
        bucket.replace_bytes("x", b"new")
        with pytest.raises(FileNotFoundError):
            file.read(1)


def test_a_store_travels_to_another_process_as_its_url(server: FakeGcs, bucket: ObjectStore) -> None:
    bucket.create_bytes("x", b"data")
    copy = pickle.loads(pickle.dumps(bucket))
    assert copy.url == bucket.url
    assert copy.read_bytes("x") == b"data"
