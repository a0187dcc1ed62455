"""Result files of commands: created once, at a local path or any URL."""

from pathlib import Path

from core.base.errors import RunError, UsageError
from core.object_store import Created, file_info, open_store


class MissingResultError(UsageError):
    """There is no file at a URL."""


def commit_result(url: str, path: Path) -> None:
    """Creates `url` from a finished local file. The same bytes may be there already; raises UsageError for others."""
    folder, name = folder_and_name(url)
    if open_store(folder).create_file(name, path, file_info(path)) is Created.ALREADY_DIFFERENT:
        raise UsageError(f"{url} exists with other content: remove it, or choose another --output")


def read_result(url: str) -> bytes:
    """The bytes of a file. Raises MissingResultError where there is none, RunError if it cannot be read."""
    folder, name = folder_and_name(url)
    try:
        return open_store(folder).read_bytes(name)
    except FileNotFoundError as error:
        raise MissingResultError(f"{url}: there is no such file") from error
    except OSError as error:
        raise RunError(f"{url}: {error.strerror or error}") from error


def folder_and_name(url: str) -> tuple[str, str]:
    """The folder of a file, `.` for a bare name, and its name. Raises UsageError where the name is missing."""
    folder, _, name = url.rpartition("/")
    if not name:
        raise UsageError(f"{url!r}: expected the name of a file")
    return folder or ("/" if url.startswith("/") else "."), name
