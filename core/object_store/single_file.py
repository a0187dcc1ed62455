"""One file by its URL, and JSON objects by their name in a store."""

import json
from pathlib import Path
from typing import Any

from core.base.errors import RunError, UsageError
from core.object_store import Created, ObjectStore, file_info, open_store


class MissingFileError(UsageError):
    """There is no file at a URL."""


def folder_and_name(url: str) -> tuple[str, str]:
    """The folder of a file, `.` for a bare name, and its name. Raises UsageError where the name is missing."""
    folder, _, name = str(url).rpartition("/")
    if not name:
        raise UsageError(f"{url!r}: expected the name of a file")
    return folder or ("/" if str(url).startswith("/") else "."), name


def read_file(url: str) -> bytes:
    """The bytes of a file, local or in a bucket. Raises MissingFileError, or UsageError if it cannot be read."""
    folder, name = folder_and_name(url)
    try:
        return open_store(folder).read_bytes(name)
    except FileNotFoundError as error:
        raise MissingFileError(f"{url}: there is no such file") from error
    except OSError as error:
        raise UsageError(f"{url}: {error.strerror or error}") from error


def create_result(url: str, content: bytes | Path) -> None:
    """Creates the result of a command, from bytes or a finished local file.

    The same content may be there already. Raises UsageError for other content.
    """
    folder, name = folder_and_name(url)
    store = open_store(folder)
    created = (
        store.create_bytes(name, content)
        if isinstance(content, bytes)
        else store.create_file(name, content, file_info(content))
    )
    if created is Created.ALREADY_DIFFERENT:
        raise UsageError(f"{url} exists with other content: remove it, or choose another --output")


def read_json_object(store: ObjectStore, name: str) -> dict[str, Any]:
    """A JSON object of a store. Raises FileNotFoundError if absent, RunError naming the file for anything else."""
    where = f"{store.url}/{name}"
    try:
        value = json.loads(store.read_bytes(name))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} is not a JSON object")
    return value
