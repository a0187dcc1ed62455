"""Which files an export has, and what is in each: decided before anything is written."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from analysis.exporting.files import FileTask
from analysis.exporting.items.order import Block, blocks_in_order, cut_blocks, shuffled_blocks
from analysis.exporting.items.part_items import part_items
from analysis.exporting.items.request import ExportRequest, ItemCut
from analysis.exporting.targets import TARGETS, TargetTraits
from core.base.canonical_json import content_hash
from core.base.errors import UsageError
from core.reading import ShardPart

# Of flat rows, so many neighbours are read at once; they are mixed with the others of their file.
_FLAT_BLOCK = 64


@dataclass(frozen=True)
class ExportPlan:
    """The files of an export.

    Attributes:
      ends: items before the end of each file, in the order in which they are exported.
      counts: items of each part.
      n_dropped: rows that rules leave out; n_short: rows at the ends of samples that fill no context; n_left_over:
        items that fill no file.
    """

    output: str
    request: ExportRequest
    parts: tuple[ShardPart, ...]
    counts: tuple[int, ...]
    ends: tuple[int, ...]
    n_dropped: int
    n_short: int
    n_left_over: int

    def tasks(self) -> Iterator[FileTask]:
        """A task for each file, in their order; they may be run in any order, and anywhere."""
        target = TARGETS[self.request.to]
        size = _FLAT_BLOCK if self.request.cut.context_size == 1 else 1
        blocks = (
            shuffled_blocks(self.counts, size, self.request.seed)
            if target.traits.is_shuffled
            else blocks_in_order(self.counts)
        )
        for number, of_file in enumerate(cut_blocks(blocks, self.ends)):
            name = target.file_name(self.request, number, len(self.ends))
            yield FileTask(self.output, name, number, self.request, *self._needed(of_file))

    def _needed(self, blocks: Sequence[Block]) -> tuple[tuple[ShardPart, ...], tuple[Block, ...]]:
        """The parts of these blocks, and the blocks with the numbers of the parts among them."""
        used = {part: place for place, part in enumerate(dict.fromkeys(part for part, _, _ in blocks))}
        return tuple(self.parts[part] for part in used), tuple(
            (used[part], first, last) for part, first, last in blocks
        )

    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the export."""
        files = [[file.sha256 for file in part.files] for part in self.parts]
        return {"request": asdict(self.request), "files": list(self.ends), "activations": content_hash(files)}


def plan_export(
    output: str, parts: Sequence[ShardPart], cut: ItemCut, traits: TargetTraits, **fields: Any
) -> ExportPlan:
    """Counts the items of every part, and deals them to files.

    fields: of the `ExportRequest`. Raises UsageError if there is no item, RunError naming a damaged file.
    """
    lengths = []
    n_dropped = n_short = 0
    for part in parts:
        items = part_items(part, cut)
        lengths.append(items.lengths if cut.context_size is None else np.full(len(items.sample), cut.context_size))
        n_dropped, n_short = n_dropped + items.n_dropped, n_short + items.n_short
    longest = max((int(each.max()) for each in lengths if len(each)), default=0)
    request = ExportRequest(cut=cut, longest=longest, **fields)
    n_items = sum(map(len, lengths))
    if not longest:
        short = f", and no sample has {cut.context_size} left" if n_short else ""
        raise UsageError(f"nothing is left to export: {n_dropped} tokens are dropped{short}")
    if traits.pads or cut.context_size is not None:
        ends = _equal_ends(n_items, request, traits)
    else:
        ends = _ends(np.concatenate(lengths), max(1, request.file_bytes // request.row_bytes))
    counts = tuple(map(len, lengths))
    return ExportPlan(output, request, tuple(parts), counts, ends, n_dropped, n_short, n_items - ends[-1])


def _equal_ends(n_items: int, request: ExportRequest, traits: TargetTraits) -> tuple[int, ...]:
    """Files of as many items as fit, the last one with what is left; or of equally many."""
    per_file = max(1, request.file_bytes // (request.item_rows * request.row_bytes))
    n_files = math.ceil(n_items / per_file)
    if traits.needs_full_files:
        # Fewer items are left over than there are files.
        per_file = n_items // n_files
        return tuple(range(per_file, n_files * per_file + 1, per_file))
    return tuple(min((number + 1) * per_file, n_items) for number in range(n_files))


def _ends(lengths: np.ndarray, most_rows: int) -> tuple[int, ...]:
    """Files of at most so many rows, or of one item."""
    total = np.concatenate([[0], np.cumsum(lengths)])
    ends, first = [], 0
    while first < len(lengths):
        last = int(np.searchsorted(total, total[first] + most_rows, side="right")) - 1
        first = max(first + 1, min(last, len(lengths)))
        ends.append(first)
    return tuple(ends)
