"""The two errors that a person sees: one line each, saying what is wrong, where, and what to do."""

from gzip import BadGzipFile

from qwen2_jax.errors import ModelError

_STORAGE_PACKAGES = {"aiohttp", "gcsfs", "google", "requests", "urllib3"}


class RunError(Exception):
    """The run cannot go on: bad data, a full disk, a storage fault. The command exits with code 1."""

    exit_code = 1


class UsageError(RunError):
    """The command line asks for something that cannot be: exits with code 2."""

    exit_code = 2


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
