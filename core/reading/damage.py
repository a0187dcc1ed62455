"""What a reader says of damaged files: one line that names the file and the command that inspects all of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import zstandard

from core.base.errors import UNREADABLE, RunError

_UNREADABLE = (*UNREADABLE, SystemError, zstandard.ZstdError)


@contextmanager
def damage(root: str, name: str) -> Iterator[None]:
    """Turns what a damaged or missing file raises into a RunError. name: of the file, below `root`."""
    advice = f"inspect the run with `python analyze_activations.py verify {root}`"
    try:
        yield
    except FileNotFoundError as error:
        raise RunError(f"{root}/{name} is missing, though a commit record names it: {advice}") from error
    except _UNREADABLE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RunError(f"{root}/{name} cannot be read: {reason}; {advice}") from error
