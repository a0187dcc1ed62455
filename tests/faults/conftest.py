"""One nursery for all fault tests, what an undisturbed worker makes of the dataset, and the sums at the end."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_gcs import FakeGcs, gcs_environment
from fleets import LARGE, LARGE_LINES, LARGE_WIDTH, flags, is_full, make_dataset, outputs
from nursery import Nursery, Worker
from tally import PROPERTY, Tally, Tried, missed, reasons_in, table, tried_in
from tiny_run import committed_files

# test_mutations runs tests of the other folders, also when it is collected alone.
sys.path[:0] = sorted({str(path.parent) for path in Path(__file__).parent.glob("*/test_*.py")})


@pytest.fixture
def tally(record_property) -> Tally:
    """For the end of a test: its fault was tried, and what was expected came about."""
    return lambda row, times=1: record_property(PROPERTY, (row, times))


def pytest_terminal_summary(terminalreporter) -> None:
    """How often each fault was tried; what falls short of the whole suite, where the whole suite was asked for."""
    terminalreporter.section("faults that were tried, with the expected result")
    for line in table(*_notes(terminalreporter), _is_whole(terminalreporter.config)):
        terminalreporter.write_line(line)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session) -> None:
    """The whole suite fails when it tried a fault less often than it should."""
    # A process of pytest-xdist reports nothing by itself.
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and _is_whole(session.config) and missed(*_notes(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _notes(reporter) -> tuple[list[Tried], dict[str, str]]:
    return tried_in(reporter.getreports("passed")), reasons_in(reporter.getreports("skipped"))


def _is_whole(config) -> bool:
    """Whether all of the faults were asked for, as `make test-faults` does."""
    asked = {Path(argument).resolve() for argument in config.args}
    folder = Path(__file__).parent
    return is_full() and asked >= {folder, folder.parent / "runs/test_pod_slice.py"} and not config.option.keyword


@pytest.fixture(scope="session")
def nursery(forks) -> Nursery:
    return Nursery(forks)


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
