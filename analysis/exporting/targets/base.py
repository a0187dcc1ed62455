"""The interface of a format of another tool. The registry is `TARGETS`."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from analysis.exporting.items.part_items import ItemBlock
from analysis.exporting.items.request import ExportRequest
from core.object_store.sinks import Sink


@dataclass(frozen=True)
class FileContent:
    """The items of one file, block by block.

    Attributes:
      number: of the file, from 0. n_items, n_rows: of all blocks.
      blocks: reads the items; each call begins anew.
    """

    request: ExportRequest
    number: int
    n_items: int
    n_rows: int
    blocks: Callable[[], Iterator[ItemBlock]]


@dataclass(frozen=True)
class TargetTraits:
    """How a target cuts and orders items.

    Attributes:
      dtypes: that it can hold.
      context_size: what it takes when none is asked for; None: an item is a sample.
      keeps_short: whether contexts may be shorter; pads: whether they are then filled up with zeros, under a mask.
      is_shuffled: whether its reader expects items in random order.
      needs_full_files: whether a last file with fewer items is left out.
      needs_tokens: whether rows have to be tokens, not pools.
      needs: a package without which it is not written.
      file_bytes: of the values of a file, at most.
    """

    dtypes: Collection[str]
    context_size: int | None = None
    keeps_short: bool = True
    pads: bool = False
    is_shuffled: bool = False
    needs_full_files: bool = False
    needs_tokens: bool = False
    needs: str | None = None
    file_bytes: int = 256 << 20


class ExportTarget(Protocol):
    """A format of another tool. The same content gives the same bytes."""

    @property
    def name(self) -> str: ...

    @property
    def traits(self) -> TargetTraits: ...

    def hook_name(self, site: str, layer: int) -> str:
        """What the tool calls the place."""
        ...

    def file_name(self, request: ExportRequest, number: int, n_files: int) -> str:
        """Of a file, below the output folder."""
        ...

    def write(self, content: FileContent, sink: Sink) -> dict[str, Any]:
        """Writes a file; returns what `metadata` needs of it, as plain JSON values."""
        ...

    def metadata(self, request: ExportRequest, files: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
        """The other files of the output, by name.

        files: of each file its `name`, `bytes`, `n_items`, `n_rows` and, as `more`, what `write` returned.
        """
        ...
