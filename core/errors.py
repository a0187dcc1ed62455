"""The two errors that a person sees: one line each, saying what is wrong, where, and what to do."""


class RunError(Exception):
    """The run cannot go on: bad data, a full disk, a storage fault. The command exits with code 1."""

    exit_code = 1


class UsageError(RunError):
    """The command line asks for something that cannot be: exits with code 2."""

    exit_code = 2
