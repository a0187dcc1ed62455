"""One nursery for all fault tests, what a calm worker makes of the dataset, and the sums at the end."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gcs import FakeGcs, gcs_environment
from fleets import LARGE, LARGE_LINES, LARGE_WIDTH, flags, is_full, make_dataset, outputs
from nursery import Nursery, Worker
from tally import PROPERTY, Tally, table, tried_in
from tiny_run import committed_files


@pytest.fixture
def tally(record_property) -> Tally:
    """For the end of a test: its fault was tried, and what was expected came about."""
    return lambda row, times=1: record_property(PROPERTY, (row, times))


def pytest_terminal_summary(terminalreporter) -> None:
    """How often each fault was tried; what falls short of the whole suite, where the whole suite was asked for."""
    config = terminalreporter.config
    has_folder = any(Path(argument).resolve() == Path(__file__).parent for argument in config.args)
    is_whole = is_full() and has_folder and not config.option.keyword
    terminalreporter.section("faults that were tried, with the expected result")
    for line in table(tried_in(terminalreporter.getreports("passed")), is_whole):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def nursery():
    with Nursery() as started:
        yield started


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder in memory where there is one: the thousands of syncs are not what is tested here."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="faults", dir=place if place.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def place(memory) -> Iterator[Path]:
    """An empty folder of the test's own."""
    folder = Path(tempfile.mkdtemp(dir=memory))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def bucket(monkeypatch) -> Iterator[FakeGcs]:
    """A fake of the storage service that this process talks to; a worker gets `gcs_environment(bucket)`."""
    with FakeGcs() as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def calm(nursery, memory) -> tuple[Path, dict[str, bytes]]:
    """The dataset, and the files of one undisturbed worker but for its claims."""
    data = make_dataset(memory / "calm")
    return data, _files_of(nursery, Worker(flags(data, memory / "calm/out")))


@pytest.fixture(scope="session")
def calm_large(nursery, memory) -> tuple[Path, dict[str, bytes]]:
    """The same with shards that take several chunks of an upload."""
    data = make_dataset(memory / "calm_large", LARGE_LINES)
    return data, _files_of(nursery, Worker(flags(data, memory / "calm_large/out", **LARGE), width=LARGE_WIDTH))


def _files_of(nursery: Nursery, worker: Worker) -> dict[str, bytes]:
    assert nursery.start(worker).finish()["status"] == "complete"
    return outputs(committed_files(Path(worker.flags["output_dir"])))
