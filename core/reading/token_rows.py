"""The rows of a fill in memory: their arrays, beside the numbers that say which token each row is.

Axis letters: R rows of a fill, k rows of a chunk, L layers that were asked for, W values of a stored row.
"""

import itertools
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64, Shaped

from core.reading.dropping import Dropping
from core.reading.files import is_read_whole
from core.reading.restoring import StoredForm
from core.reading.schedule import Chunk
from core.reading.shard_part import PartRows, ShardPart
from core.reading.unprojection import Unprojection

INDEX_BYTES = 8 + 3 * 4 + 8
"""What a row takes beside its arrays: the fields of `FillRows`, and its place in the order."""
# Requests to a bucket under way at once: each waits tens of milliseconds and brings a few hundred kilobytes.
_REQUESTS = 16


@dataclass(frozen=True)
class RowRequest:
    """What is read of which parts.

    Attributes:
      parts: all parts, of which chunks name some by their index.
      open_parts: how many of them may be open at once.
      unprojection: what restored rows are multiplied with.
    """

    parts: tuple[ShardPart, ...]
    site: str
    layers: tuple[int, ...]
    form: StoredForm
    drop: Dropping
    open_parts: int
    unprojection: Unprojection | None = None

    @property
    def row_bytes(self) -> int:
        """The bytes of a row in memory: every layer, as stored, and its index."""
        return len(self.layers) * sum(array.row_bytes for array in self.form.arrays.values()) + INDEX_BYTES


Index = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class FillRows:
    """Rows in memory; valid until the next fill is loaded.

    Attributes:
      arrays: by name, as stored.
      folders: of each row, the index of its part's folder among the folders of the run.
    """

    arrays: Mapping[str, Shaped[np.ndarray, "R L _"]]
    sample_idx: Int64[np.ndarray, "R"]
    positions: Int32[np.ndarray, "R"]
    token_ids: Int32[np.ndarray, "R"]
    folders: Int32[np.ndarray, "R"]

    def __len__(self) -> int:
        return len(self.sample_idx)

    @property
    def index(self) -> Index:
        """The fields beside the arrays."""
        return self.sample_idx, self.positions, self.token_ids, self.folders

    def up_to(self, n_rows: int) -> "FillRows":
        """The first rows."""
        arrays = {name: array[:n_rows] for name, array in self.arrays.items()}
        return FillRows(arrays, *(numbers[:n_rows] for numbers in self.index))


Span = tuple[int, int]
"""Rows (start, stop) of a part."""


class RowReader:
    """Reads the chunks of fills, and keeps the files open between them."""

    def __init__(self, request: RowRequest) -> None:
        self._request = request
        self._open: OrderedDict[int, PartRows] = OrderedDict()
        self._folders = {folder: i for i, folder in enumerate(dict.fromkeys(part.folder for part in request.parts))}
        self._room: FillRows | None = None
        self._threads: ThreadPoolExecutor | None = None

    def load(self, chunks: Sequence[Chunk]) -> FillRows:
        """The rows of these chunks, side by side in their order. Raises RunError naming a damaged file.

        chunks: sorted by part and row.
        """
        if len(chunks) == 1 and len(self._request.layers) == 1:
            return self._view(chunks[0])
        room = self._room_for(sum(chunk.stop - chunk.start for chunk in chunks))
        stop = 0
        for part, of_part in itertools.groupby(chunks, key=lambda chunk: chunk.part):
            stop = self._copy(self._part(part), list(of_part), room, stop)
        return room.up_to(stop)

    def _view(self, chunk: Chunk) -> FillRows:
        """The rows of one chunk at one layer, without a copy where the file is mapped."""
        rows = self._part(chunk.part)
        span = chunk.start, min(chunk.stop, rows.n_rows)
        (stored,) = self._fetch(rows, span)
        index, kept = self._index(rows, [span])
        arrays = {name: (array if kept is None else array[kept])[:, None] for name, array in stored.items()}
        return FillRows(arrays, *index)

    def _copy(self, rows: PartRows, chunks: Sequence[Chunk], room: FillRows, stop: int) -> int:
        """Appends the rows of a part after the first `stop` rows of `room`; returns the new number of rows."""
        spans = _joined(chunks, rows.n_rows)
        index, kept = self._index(rows, spans)
        start, first = stop, 0
        for span, stored in zip(spans, self._fetched(rows, spans), strict=True):
            size = span[1] - span[0]
            mask = None if kept is None else kept[first : first + size]
            start, stop = stop, stop + (size if mask is None else int(np.count_nonzero(mask)))
            first += size
            for slot, arrays in enumerate(stored):
                for name, array in arrays.items():
                    room.arrays[name][start:stop, slot] = array if mask is None else array[mask]
        for array, numbers in zip(room.index, index, strict=True):
            array[stop - len(numbers) : stop] = numbers
        return stop

    def _index(self, rows: PartRows, spans: Sequence[Span]) -> tuple[Index, Bool[np.ndarray, "k"] | None]:
        """The numbers of the rows that stay, and which these are; None: all."""
        samples, positions, token_ids = rows.token_index(spans)
        folders = np.full(len(samples), self._folders[rows.part.folder], np.int32)
        index = rows.sample_idx[samples], positions, token_ids, folders
        kept = self._request.drop.kept(rows, samples, positions, token_ids)
        return (index, None) if kept is None else (tuple(numbers[kept] for numbers in index), kept)

    def _fetch(self, rows: PartRows, span: Span) -> list[dict[str, Shaped[np.ndarray, "k _"]]]:
        return [rows.stored(layer, *span) for layer in self._request.layers]

    def _fetched(self, rows: PartRows, spans: Sequence[Span]) -> Iterator[list[dict[str, np.ndarray]]]:
        """What `_fetch` gives for each span: from a disk one by one, from a bucket some ahead, as requests wait."""
        if "://" not in rows.part.root:
            yield from (self._fetch(rows, span) for span in spans)
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_REQUESTS)
        ahead: deque[Future[list[dict[str, np.ndarray]]]] = deque()
        for span in spans:
            ahead.append(self._threads.submit(self._fetch, rows, span))
            if len(ahead) > _REQUESTS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _part(self, number: int) -> PartRows:
        """The part, open; the one that was used longest ago is closed where too many are."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        part = self._request.parts[number]
        limit = 1 if is_read_whole(part.format) else self._request.open_parts
        while len(self._open) >= limit:
            self._open.popitem(last=False)
        self._open[number] = part.read(self._request.site, self._request.layers)
        return self._open[number]

    def _room_for(self, n_rows: int) -> FillRows:
        """Arrays of at least `n_rows` rows, which every fill uses again."""
        if self._room is None or len(self._room) < n_rows:
            self._room = None  # the old ones are freed before the new ones are allocated
            shape = n_rows, len(self._request.layers)
            arrays = {n: np.empty((*shape, array.width), array.dtype) for n, array in self._request.form.arrays.items()}
            numbers = (np.empty(n_rows, np.int32) for _ in range(3))
            self._room = FillRows(arrays, np.empty(n_rows, np.int64), *numbers)
        return self._room


def _joined(chunks: Sequence[Chunk], n_rows: int) -> list[Span]:
    """The rows of chunks of one part; neighbouring chunks become one span, and none ends after `n_rows`."""
    spans: list[Span] = []
    for chunk in chunks:
        start, stop = min(chunk.start, n_rows), min(chunk.stop, n_rows)
        if spans and spans[-1][1] == start:
            start = spans.pop()[0]
        spans.append((start, stop))
    return spans
