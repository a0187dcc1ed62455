"""One store for each URL and process: what comes from another process as a URL need not connect again each time."""

import functools
import os

from core.base.endpoints import emulator_url
from core.object_store import ObjectStore, open_store


def shared_store(url: str) -> ObjectStore:
    """The store at `url`, opened once in this process. Raises as `open_store` does."""
    # A connection of a parent process must not be used after a fork, nor one to another server than the one now named.
    return _opened(url, os.getpid(), emulator_url())


@functools.lru_cache(maxsize=16)
def _opened(url: str, process: int, emulator: str | None) -> ObjectStore:
    return open_store(url)
