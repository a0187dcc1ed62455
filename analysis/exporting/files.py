"""One file of an export: a function of a task, which is plain data and can be sent to another process or machine."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from analysis.exporting.items.order import Block
from analysis.exporting.items.part_items import ItemBlock, item_blocks, part_items
from analysis.exporting.items.request import ExportRequest
from analysis.exporting.targets import TARGETS, FileContent
from core.base.errors import RunError
from core.object_store import Created, LocalStore, ObjectInfo, ObjectStore, disk_errors, open_store
from core.object_store.sinks import DigestWriter
from core.reading import ShardPart


@dataclass(frozen=True)
class FileTask:
    """A file to be written. It is picklable and needs nothing but itself.

    Attributes:
      output: URL of the output folder. name: of the file below it. number: from 0.
      parts: that have its items. blocks: (index among `parts`, first item, one past the last), in their order.
    """

    output: str
    name: str
    number: int
    request: ExportRequest
    parts: tuple[ShardPart, ...] = field(repr=False)
    blocks: tuple[Block, ...] = field(repr=False)


@dataclass(frozen=True)
class ExportedFile:
    """A file that is written. more: what the target's metadata needs of it."""

    number: int
    name: str
    bytes: int
    crc32c: str
    n_items: int
    n_rows: int
    more: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def export_file(task: FileTask) -> ExportedFile:
    """Writes the file of a task, create-only; memory is bounded by `request.file_bytes`.

    The same task gives the same bytes, so that two processes that run it do no harm. Raises RunError if another file
    has its name, or a value does not fit the dtype of the export.
    """
    store = open_store(task.output)
    content = _content(task)
    path = _temporary(store, task.name)
    try:
        with disk_errors(path), path.open("wb") as file:
            sink = DigestWriter(file)
            more = TARGETS[task.request.to].write(content, sink)
        digest = sink.digest()
        if store.create_file(task.name, path, ObjectInfo(digest.bytes, digest.crc32c)) is Created.ALREADY_DIFFERENT:
            raise RunError(f"{store.url}/{task.name} exists with other content: remove it, or use another --output")
    finally:
        path.unlink(missing_ok=True)
    return ExportedFile(task.number, task.name, digest.bytes, digest.crc32c, content.n_items, content.n_rows, more)


def _content(task: FileTask) -> FileContent:
    request = task.request
    n_items = sum(last - first for _, first, last in task.blocks)
    n_rows = 0
    for part, first, last in task.blocks:
        bounds = part_items(task.parts[part], request.cut).bounds
        n_rows += int(bounds[last] - bounds[first])

    def blocks() -> Iterator[ItemBlock]:
        for part, first, last in task.blocks:
            yield from item_blocks(task.parts[part], first, last, request)

    return FileContent(request, task.number, n_items, n_rows, blocks)


def _temporary(store: ObjectStore, name: str) -> Path:
    """A path for the file before it has its name: on the disk of a local output, else in the temporary folder."""
    if isinstance(store, LocalStore):
        return store.temporary_path(name)
    descriptor, path = tempfile.mkstemp(prefix="export_")
    open(descriptor, "rb").close()
    return Path(path)
