"""From the rows of a part to items. Axis letters: see the package."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from analysis.exporting.items.request import ExportRequest, ItemCut
from core.base.dtypes import DTYPES
from core.base.errors import RunError
from core.reading import PartRows, ShardPart
from core.reduce.reductions import VALUES

BLOCK_BYTES = 16 << 20
_OPEN_PARTS = 64


@dataclass(frozen=True)
class PartItems:
    """The items of a part: item i has rows[bounds[i]:bounds[i + 1]].

    Attributes:
      rows: numbers of the rows that are exported.
      sample: the place of each item's sample in the part.
      n_dropped: rows that rules leave out; n_short: rows at the ends of samples that fill no context.
    """

    rows: Int64[np.ndarray, "N"]
    bounds: Int64[np.ndarray, "I_plus_1"]
    sample: Int64[np.ndarray, "I"]
    n_dropped: int
    n_short: int

    @property
    def lengths(self) -> Int64[np.ndarray, "I"]:
        """Rows of each item."""
        return np.diff(self.bounds)


@dataclass(frozen=True)
class ItemBlock:
    """Neighbouring items of a part, in memory.

    Attributes:
      values: in the dtype of the export. token_ids, positions: of each row.
      lengths: rows of each item. samples: the place of each item's sample in the part.
    """

    part: ShardPart
    values: Shaped[np.ndarray, "N D"]
    token_ids: Int32[np.ndarray, "N"]
    positions: Int32[np.ndarray, "N"]
    lengths: Int64[np.ndarray, "I"]
    samples: Int64[np.ndarray, "I"]
    sample_idx: Int64[np.ndarray, "I"]


@functools.lru_cache(maxsize=_OPEN_PARTS)
def part_items(part: ShardPart, cut: ItemCut) -> PartItems:
    """The items of a part: a function of these two values alone. Raises RunError naming a damaged file."""
    rows = opened(part, cut)
    numbers = np.arange(rows.n_rows)
    samples = rows.sample_of_rows()
    if cut.drop.token_ids or cut.drop.positions:
        kept = cut.drop.kept(rows, samples, rows.positions(), rows.token_ids())
        numbers, samples = (numbers, samples) if kept is None else (numbers[kept], samples[kept])
    n_dropped = rows.n_rows - len(numbers)
    counts = np.bincount(samples, minlength=part.n_samples).astype(np.int64)
    if cut.context_size is None:
        return PartItems(numbers, np.concatenate([[0], np.cumsum(counts)]), np.arange(part.n_samples), n_dropped, 0)
    size = cut.context_size
    place = np.arange(len(numbers)) - (np.cumsum(counts) - counts)[samples]
    in_context = np.ones(len(numbers), bool) if cut.keeps_short else place < (counts // size * size)[samples]
    numbers, samples, place = numbers[in_context], samples[in_context], place[in_context]
    starts = np.flatnonzero(place % size == 0)
    bounds = np.append(starts, len(numbers)).astype(np.int64)
    return PartItems(numbers, bounds, samples[starts], n_dropped, int((~in_context).sum()))


@functools.lru_cache(maxsize=_OPEN_PARTS)
def _opened(part: ShardPart, site: str, layer: int) -> PartRows:
    return part.read(site, layer)


@functools.lru_cache(maxsize=1)
def _opened_whole(part: ShardPart, site: str, layer: int) -> PartRows:
    return part.read(site, layer)


def opened(part: ShardPart, cut: ItemCut) -> PartRows:
    """The part at its site and layer; the last ones stay open, of pickles, which are in memory whole, only one."""
    return (_opened_whole if part.format == "pickle" else _opened)(part, cut.site, cut.layer)


def item_blocks(
    part: ShardPart, first: int, last: int, request: ExportRequest, block_bytes: int = BLOCK_BYTES
) -> Iterator[ItemBlock]:
    """Items first to last - 1 of a part, in blocks of at most `block_bytes` of values, or of one item."""
    items = part_items(part, request.cut)
    most_rows = max(1, block_bytes // request.row_bytes)
    while first < last:
        stop = int(np.searchsorted(items.bounds, items.bounds[first] + most_rows, side="right")) - 1
        stop = min(last, max(first + 1, stop))
        yield _block(part, items, first, stop, request)
        first = stop


def _block(part: ShardPart, items: PartItems, first: int, last: int, request: ExportRequest) -> ItemBlock:
    rows = opened(part, request.cut)
    numbers = items.rows[items.bounds[first] : items.bounds[last]]
    values = np.empty((len(numbers), request.width), request.numpy_dtype)
    token_ids, positions = (np.empty(len(numbers), np.int32) for _ in range(2))
    for place, start, stop in _spans(numbers, max(1, BLOCK_BYTES // request.row_bytes)):
        chosen = numbers[place] - start
        values[place] = _values(rows, start, stop, request)[chosen]
        token_ids[place] = rows.token_ids(start, stop)[chosen]
        positions[place] = rows.positions(start, stop)[chosen]
    samples = items.sample[first:last]
    lengths = items.lengths[first:last]
    return ItemBlock(part, values, token_ids, positions, lengths, samples, rows.sample_idx[samples])


def _spans(numbers: Int64[np.ndarray, "N"], most_rows: int) -> Iterator[tuple[slice, int, int]]:
    """Cuts ascending row numbers into runs that lie in ranges of at most `most_rows` rows: places, start, stop."""
    place = 0
    while place < len(numbers):
        start = int(numbers[place])
        end = int(np.searchsorted(numbers, start + most_rows))
        yield slice(place, end), start, int(numbers[end - 1]) + 1
        place = end


def _values(rows: PartRows, start: int, stop: int, request: ExportRequest) -> Shaped[np.ndarray, "k D"]:
    """Rows in the dtype of the export. Raises RunError where a value does not fit it."""
    layer, dtype = request.cut.layer, request.numpy_dtype
    if rows.form.arrays.keys() == {VALUES} and rows.form.arrays[VALUES].dtype == dtype:
        return rows.stored(layer, start, stop)[VALUES]
    exact = rows.rows(layer, start, stop)
    with np.errstate(over="ignore"):
        cast = exact.astype(dtype)
    too_large = np.isinf(cast.astype(np.float32)) & np.isfinite(exact)
    if too_large.any():
        row = start + int(np.flatnonzero(too_large.any(axis=1))[0])
        sample = rows.sample_idx[rows.sample_of_rows(row, row + 1)[0]]
        wide = " or ".join(f"--dtype {name}" for name in ("float32", "bfloat16") if DTYPES[name] != dtype)
        raise RunError(f"sample {sample}: {float(np.abs(exact).max()):g} does not fit {dtype}: use {wide}")
    return cast
