"""What a worker process is made to be: an environment that loses replies, or code with a safeguard taken out."""

import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from core.activation_storage import ActivationStorage
from core.claims.leases import Lease, ShardClaims
from core.commit import record as commit_record
from core.commit.record import StoredFile
from core.object_store import Created, LocalStore, gcs, local
from core.run import runner, sharded_run, stream_run

CHANGES: dict[str, Callable[[], None]] = {}


def change(function: Callable[[], None]) -> Callable[[], None]:
    """Registers a change under the function's name."""
    CHANGES[function.__name__] = function
    return function


@change
def link_replies_are_lost() -> None:
    """A network disk that makes the link, loses the reply and refuses the repetition."""
    take = local._take_name

    def lose(temporary: Path, final: Path) -> None:
        take(temporary, final)
        raise FileExistsError(final)

    local._take_name = lose


@change
def every_create_is_repeated() -> None:
    """A client that repeats what has succeeded."""
    create = LocalStore.create_bytes

    def twice(store, name, data):
        create(store, name, data)
        return create(store, name, data)

    LocalStore.create_bytes = twice


# Safeguards taken out: `test_mutations.py` shows that the suite misses each of them.


@change
def files_replace_what_stands() -> None:
    """No create-only on a disk: the last writer wins."""

    def replace(temporary: Path, final: Path) -> bool:
        temporary.replace(final)
        return True

    local._publish = replace


@change
def uploads_replace_what_stands() -> None:
    """No create-only in a bucket."""
    upload = gcs.GcsStore._upload

    def unconditional(store, name, file, info, nonce, condition):
        return upload(store, name, file, info, nonce, {})

    gcs.GcsStore._upload = unconditional


@change
def nobody_reads_back_on_a_disk() -> None:
    """A name that is taken is somebody else's, whatever stands there."""

    def create(store, name, data):
        final = store._path(name)
        return (
            Created.CREATED if local._publish(store._write_temporary(name, data), final) else Created.ALREADY_DIFFERENT
        )

    LocalStore.create_bytes = create


@change
def nobody_reads_back_in_a_bucket() -> None:
    """The same where a reply was lost."""

    def create(store, name, file, want):
        try:
            store._upload(name, file, want, "nonce", {"ifGenerationMatch": "0"})
        except FileExistsError:
            return Created.ALREADY_DIFFERENT
        return Created.CREATED

    gcs.GcsStore._create = create


@change
def nobody_reads_the_record_that_stands() -> None:
    """Whoever comes second at a commit believes its own record."""
    read = ActivationStorage.commit

    def commit(storage, record):
        mine = record.to_bytes()
        primary, storage._primary = storage._primary, _Reads(storage._primary, mine)
        try:
            return read(storage, record)
        finally:
            storage._primary = primary

    ActivationStorage.commit = commit


class _Reads:
    """A store that gives back what one wanted to write."""

    def __init__(self, store, data: bytes) -> None:
        self._store, self._data = store, data

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    def read_bytes(self, name: str) -> bytes:
        return self._data


@change
def checkpoints_come_before_commits() -> None:
    """The checkpoint says that a window is done, then it is committed."""
    commit = ActivationStorage.commit

    def late(storage, record):
        storage.hook(record)
        return commit(storage, record)

    init = stream_run._Bookkeeper.__init__

    def hooked(keeper, job, storage, may_write_metadata):
        init(keeper, job, storage, may_write_metadata)
        storage.hook = keeper.committed

    stream_run._Bookkeeper.__init__ = hooked
    ActivationStorage.commit = late


@change
def records_come_before_files() -> None:
    """A window counts before its files are stored."""
    store, commit = ActivationStorage.store, ActivationStorage.commit

    def later(storage, window, file):
        data = file.path.read_bytes()
        storage.__dict__.setdefault("late", []).append((window, file, data))
        digest = file.digest
        return StoredFile(file.name, file.site, digest.bytes, digest.crc32c, digest.sha256)

    def commit_first(storage, record):
        storage._claim()
        standing = commit(storage, record)
        late = storage.__dict__.get("late", [])
        for window, file, data in [item for item in late if item[0] == record.window]:
            file.path.write_bytes(data)
            store(storage, window, file)
        return standing

    ActivationStorage.store, ActivationStorage.commit = later, commit_first


@change
def leases_expire_by_the_wall_clock() -> None:
    """The TTL is measured by a clock that people set."""
    init = ShardClaims.__init__

    def on_the_wall(claims, *args, **kw):
        init(claims, *args, **kw)
        claims.clock = lambda: time.time()

    ShardClaims.__init__ = on_the_wall


@change
def leases_expire_at_once() -> None:
    """An observer does not wait for the TTL."""
    ShardClaims._has_expired = lambda claims, shard: True


@change
def zombies_give_signs_of_life() -> None:
    """Nobody looks whether the shard was taken over."""
    Lease.is_held = lambda lease: True


@change
def hung_workers_give_signs_of_life() -> None:
    """The heartbeat goes on whatever the work does."""
    Lease._is_progressing = lambda lease: True


@change
def signals_wait_for_the_main_thread() -> None:
    """The way most programs do it."""

    @contextmanager
    def plainly(grace_s=15.0, **others):
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        yield stop

    for module in (runner, sharded_run):
        module.stop_on_signals = plainly


@change
def records_carry_no_checksum() -> None:
    """A record is believed as long as it parses."""
    commit_record.read_sealed_json = lambda data: {
        name: value for name, value in json.loads(data).items() if name != "checksum"
    }
