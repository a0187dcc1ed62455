"""The errors that a person sees: one line each, saying what is wrong, where, and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path

_STORAGE_PACKAGES = {"aiohttp", "gcsfs", "google", "requests", "urllib3"}


class RunError(Exception):
    """The run cannot go on: bad data, a full disk, a storage fault. The command exits with code 1."""

    exit_code = 1


class UsageError(RunError):
    """The command line asks for something that cannot be: exits with code 2."""

    exit_code = 2


class ModelError(Exception):
    """A model cannot be used as given: the message says which file, field or tensor and what to do."""


class UnsupportedError(ModelError):
    """A config that may be right asks for what is not implemented here: another implementation may have it."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns the system's refusal to give a file into a `ModelError` naming it (`path` where the system names none)."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def is_fault_of_the_machine(error: BaseException) -> bool:
    """Whether an error comes from this machine, its storage or the command line rather than from a shard's data.

    A device that fails is the machine's fault, one that is too small for a shard is not: it would be everywhere.
    """
    while True:
        if type(error).__module__.partition(".")[0] == "jaxlib" and "RESOURCE_EXHAUSTED" not in str(error):
            return True
        if isinstance(error, OSError | MemoryError | UsageError | ModelError) and not isinstance(error, BadGzipFile):
            return True
        if type(error).__module__.partition(".")[0] in _STORAGE_PACKAGES:
            return True
        if error.__cause__ is None:
            return False
        error = error.__cause__
