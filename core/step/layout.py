"""Packing: samples of a window into rows, rows into steps of static shape.

Axis letters: B rows of a step, T tokens of a row, S samples of a window.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

# The vector unit of a TPU and the attention blocks are 128 wide: other row lengths would be padded on the device.
ROW_MULTIPLE = 128
SMALLEST_PACKED_ROW = 512
# Number of longest samples that share a row, for devices whose attention skips what lies outside a sample.
LONG_ROW = 2


@dataclass(frozen=True)
class StepLayout:
    """Which samples one step computes: `rows` of equal length, filled up to `n_rows` with empty ones.

    rows: the window's samples that share each row, in their order.
    """

    length: int
    n_rows: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class StepArrays:
    """The device inputs of a step. Padding has token 0, segment 0 and position 0; segments count from 1 in a row."""

    tokens: Int32[np.ndarray, "B T"]
    segment_ids: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]


@dataclass(frozen=True)
class BatchShape:
    """The shapes of steps and of their rows; each shape is compiled.

    Attributes:
      rows_per_step: rows of a full step over all devices.
      row_multiple: every step has a multiple of this many rows (the number of data-parallel devices).
      row_lengths: ascending; the last one holds the longest sample, and is what samples are packed into.
      pack: several samples to a row; otherwise one.
    """

    rows_per_step: int
    row_multiple: int
    row_lengths: tuple[int, ...]
    pack: bool


def default_row_lengths(max_seq_length: int) -> tuple[int, ...]:
    """Powers of two times 128 below `max_seq_length`, then `max_seq_length` rounded up to a multiple of 128."""
    longest = _round_up(max_seq_length)
    lengths = []
    length = ROW_MULTIPLE
    while length < longest:
        lengths.append(length)
        length *= 2
    return (*lengths, longest)


def packed_row_lengths(max_seq_length: int, *, long_rows: bool) -> tuple[int, ...]:
    """The row lengths for packing: those of `default_row_lengths` that are not too short to share.

    `long_rows`, for devices whose attention skips what lies outside a sample and that compile in a second: rows that
    hold the longest sample twice, in eighths of that length, which leaves little padding.
    """
    if not long_rows:
        lengths = default_row_lengths(max_seq_length)
    else:
        longest = LONG_ROW * _round_up(max_seq_length)
        lengths = tuple(sorted({_round_up(longest * eighths // 8) for eighths in range(1, 9)}))
    floor = min(SMALLEST_PACKED_ROW, lengths[-1])
    return tuple(length for length in lengths if length >= floor)


def _round_up(length: int) -> int:
    return -(-length // ROW_MULTIPLE) * ROW_MULTIPLE


def lay_out_rows(lengths: Sequence[int], shape: BatchShape) -> dict[int, list[tuple[int, ...]]]:
    """Lays samples of `lengths` tokens into rows: by the length of the rows, longest first, the samples of each.

    Best-fit decreasing: a sample goes to the open row that it fills best, else opens another of the longest length.
    Every row is then cut down to the shortest length that holds its samples.
    """
    members: list[list[int]] = []
    open_rows = _OpenRows()
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        row, room = open_rows.take(lengths[index]) if shape.pack else (None, 0)
        if row is None:
            row, room = len(members), shape.row_lengths[-1]
            members.append([])
        members[row].append(index)
        open_rows.add(row, room - lengths[index])
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for samples in members:
        by_length[_shortest(shape, sum(lengths[index] for index in samples))].append(tuple(samples))
    return dict(sorted(by_length.items(), reverse=True))


def _shortest(shape: BatchShape, needed: int) -> int:
    return next(length for length in shape.row_lengths if length >= needed)


class _OpenRows:
    """Rows by the room they have left. Bit r of `_rooms` says that some row has room r: the best fit is one shift."""

    def __init__(self) -> None:
        self._by_room: dict[int, deque[int]] = defaultdict(deque)
        self._rooms = 0

    def add(self, row: int, room: int) -> None:
        self._by_room[room].append(row)
        self._rooms |= 1 << room

    def take(self, length: int) -> tuple[int | None, int]:
        """The row with the least room that holds `length`, and that room; None when no row does."""
        fitting = self._rooms >> length
        if not fitting:
            return None, 0
        room = length + (fitting & -fitting).bit_length() - 1
        rows = self._by_room[room]
        row = rows.popleft()
        if not rows:
            self._rooms &= ~(1 << room)
        return row, room


def lay_out_steps(lengths: Sequence[int], shape: BatchShape) -> list[StepLayout]:
    """Groups the rows of a window into steps of one row length each, longest rows first.

    A full step has `rows_per_step` rows. The last rows of a length form smaller steps (4, 2, 1 × row_multiple)
    instead of being padded to a full step: few static shapes, little padding.
    """
    steps = []
    for length, rows in lay_out_rows(lengths, shape).items():
        first = 0
        while first < len(rows):
            n_rows = _step_rows(len(rows) - first, shape)
            steps.append(StepLayout(length, n_rows, tuple(rows[first : first + n_rows])))
            first += n_rows
    return steps


def lay_out_part(lengths: Sequence[int], shape: BatchShape) -> tuple[StepLayout, ...]:
    """The layouts of a part of a window; an empty part has one of padding, so that it is committed like any other."""
    return tuple(lay_out_steps(lengths, shape)) or (StepLayout(shape.row_lengths[0], shape.row_multiple, ()),)


def _step_rows(n_left: int, shape: BatchShape) -> int:
    n_rows = shape.rows_per_step
    while n_rows > n_left and n_rows % (2 * shape.row_multiple) == 0:
        n_rows //= 2
    return n_rows


def step_arrays(layout: StepLayout, token_ids: Sequence[Int32[np.ndarray, "_"]]) -> StepArrays:
    """The token, segment and position arrays of a step, (n_rows, length) each; `token_ids` is indexed by sample."""
    tokens, segments, positions = (np.zeros((layout.n_rows, layout.length), np.int32) for _ in range(3))
    for row_index, sample, start, stop in sample_spans(layout, [len(ids) for ids in token_ids]):
        tokens[row_index, start:stop] = token_ids[sample]
        segments[row_index, start:stop] = segments[row_index, start - 1] + 1 if start else 1
        positions[row_index, start:stop] = np.arange(stop - start)
    return StepArrays(tokens, segments, positions)


def sample_spans(layout: StepLayout, lengths: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Where each sample of a step lies: (row, sample, first token, one past the last token)."""
    spans = []
    for row_index, samples in enumerate(layout.rows):
        start = 0
        for sample in samples:
            stop = start + lengths[sample]
            spans.append((row_index, sample, start, stop))
            start = stop
    return spans
