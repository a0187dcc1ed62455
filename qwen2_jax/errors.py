"""The error a model folder, file or config can raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
