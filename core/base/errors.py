"""The errors that users see: one line each, saying what is wrong, where, and what to do."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from gzip import BadGzipFile
from pathlib import Path

_STORAGE_PACKAGES = {"aiohttp", "gcsfs", "google", "requests", "urllib3"}
UNREADABLE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What readers of json, pickle, gzip, numpy and zip raise for damaged files; some formats add errors of their own."""


class RunError(Exception):
    """The run cannot continue: bad data, a full disk, a storage fault. The command exits with code 1."""

    exit_code = 1


class UsageError(RunError):
    """The command line is invalid: exits with code 2."""

    exit_code = 2


class ModelError(Exception):
    """A model cannot be used as given: the message names the file, field or tensor, and what to do."""


class UnsupportedError(ModelError):
    """A config may be valid, but needs something that is not implemented here; another implementation may have it."""


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns an OSError into a `ModelError` that names the file (`path` where the error names none)."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error


def is_machine_fault(error: BaseException) -> bool:
    """Whether an error comes from this machine, its storage or the command line rather than from the data.

    A device failure is a machine fault; running out of device memory is not: it would happen on every machine.
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
