"""Batches of tokens, in order or shuffled, with a state that can be saved after every batch.

Axis letters: B rows of a batch, L layers that were asked for, W values of a stored row, D of a restored one.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from core.base.canonical_json import content_hash
from core.base.errors import UsageError
from core.base.json_types import mistyped
from core.reading.schedule import Place, Schedule
from core.reading.token_rows import FillRows, RowReader, RowRequest
from core.reduce.reductions import VALUES

_STATE = {"epoch": (int,), "group": (int,), "fill": (int,), "row": (int,), "order": (str,)}
# Rows are gathered and converted so many at a time, which stay in the processor's cache in between.
_BLOCK_ROWS = 256


@dataclass(frozen=True)
class TokenBatch:
    """A batch of rows: of tokens, or of pools.

    Attributes:
      activations: (B, D) for one layer, (B, L, D) for a list; float32, or as stored with restore=False.
      sample_idx: the sample of each row. positions: the place of its token in the sample. token_ids: its token.
        The last two are -1 for pools.
      folders: the index among `acts.folders` of the folder that holds the row: samples of different streams may have
        one number.
      more: with restore=False, the further arrays of the same rows: `scale`, `indices`.
    """

    activations: Shaped[np.ndarray, "B *layers _"]
    sample_idx: Int64[np.ndarray, "B"]
    positions: Int32[np.ndarray, "B"]
    token_ids: Int32[np.ndarray, "B"]
    folders: Int32[np.ndarray, "B"]
    more: Mapping[str, Shaped[np.ndarray, "B *layers _"]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.sample_idx)

    def arrays(self) -> dict[str, Shaped[np.ndarray, "B ..."]]:
        """All arrays by name, those of `more` among them."""
        names = ("activations", "sample_idx", "positions", "token_ids", "folders")
        return {name: getattr(self, name) for name in names} | dict(self.more)


@dataclass(frozen=True)
class BatchRequest:
    """How rows become batches.

    Attributes:
      epochs: how often all rows are read; None: without end.
      drop_last: whether a last batch of an epoch with fewer rows is left out.
      restore: whether activations are float32 in the space of the model; else they are as stored.
      is_single: whether one layer was asked for by its number, and batches have no axis of layers.
    """

    batch_size: int
    epochs: int | None = 1
    drop_last: bool = False
    restore: bool = True
    is_single: bool = True


class TokenBatches(Iterator[TokenBatch]):
    """An iterator of batches; `state_dict` after any batch, loaded into a new one, continues with the same bits.

    The order of the rows depends on the seed, the epoch and the settings of the shuffle, never on the batch size.
    Iterating raises RunError naming a damaged file, UsageError if no row is left to make a batch of.
    """

    def __init__(self, rows: RowRequest, schedule: Schedule, batches: BatchRequest) -> None:
        self._rows, self._schedule, self._batches = rows, schedule, batches
        self._reader = RowReader(rows)
        self._place = Place()
        self._fill: tuple[FillRows, np.ndarray | None] | None = None
        self._epochs_without_batch = 0

    def __next__(self) -> TokenBatch:
        batch = _Assembly(self._rows, self._batches)
        while not batch.is_full:
            if not self._find_rows():
                if batch.n_rows and not self._batches.drop_last:
                    break
                batch.n_rows = 0
                self._begin_next_epoch()
                continue
            assert self._fill is not None
            fill, order = self._fill
            stop = min(self._place.row + batch.n_missing, len(fill))
            rows = slice(self._place.row, stop)
            batch.add(fill, rows if order is None else order[rows])
            self._place = replace(self._place, row=stop)
        self._epochs_without_batch = 0
        return batch.finish()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, as a few numbers for JSON."""
        return asdict(self._place) | {"order": self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the batch after which `state` was taken. Raises UsageError for a state of another order."""
        wrong = mistyped(dict(state), _STATE)
        if wrong is not None:
            raise UsageError(f"not a state of a token iterator: {wrong!r} is missing or of the wrong type")
        if state["order"] != self._order():
            raise UsageError(
                "the state belongs to another order of tokens: open the same committed windows, site, layers and drop, "
                "with the same shuffle, seed, buffer_bytes and share"
            )
        self._place = Place(**{name: state[name] for name in _STATE if name != "order"})
        self._fill, self._epochs_without_batch = None, 0

    def _order(self) -> str:
        """A hash of everything that the order depends on."""
        names = [(part.folder, part.window, part.part) for part in self._rows.parts]
        return content_hash([names, asdict(self._schedule), asdict(self._rows.drop)])

    def _find_rows(self) -> bool:
        """Loads the fill of the next row; False at the end of the epoch."""
        place = self._place
        groups = self._schedule.groups(place.epoch)
        while place.group < len(groups):
            fills = self._schedule.fills(place.epoch, place.group)
            if place.fill >= len(fills):
                place = Place(place.epoch, place.group + 1)
                continue
            if self._fill is None:
                rows = self._reader.load(fills[place.fill])
                self._fill = rows, self._schedule.order(place, len(rows))
            if place.row < len(self._fill[0]):
                self._place = place
                return True
            place, self._fill = Place(place.epoch, place.group, place.fill + 1), None
        self._place, self._fill = place, None
        return False

    def _begin_next_epoch(self) -> None:
        """Raises StopIteration after the last one."""
        epochs, epoch = self._batches.epochs, self._place.epoch
        if not self._schedule.parts(0) or (epochs is not None and epoch + 1 >= epochs):
            raise StopIteration
        self._epochs_without_batch += 1
        if self._epochs_without_batch > 1:
            raise UsageError("a whole epoch has no batch: fewer tokens are left than batch_size")
        self._place, self._fill = Place(epoch + 1), None


class _Assembly:
    """A batch that is being filled."""

    def __init__(self, rows: RowRequest, batches: BatchRequest) -> None:
        self._rows, self._form, self._batches = rows, rows.form, batches
        self.n_rows = 0
        shape = batches.batch_size, len(rows.layers)
        # Plain values are converted as they are gathered; codes are restored once they are together.
        self._converts = batches.restore and rows.form.arrays.keys() == {VALUES}
        self._arrays = {
            name: np.empty((*shape, array.width), np.float32 if self._converts else array.dtype)
            for name, array in rows.form.arrays.items()
        }
        size = batches.batch_size
        self._samples = np.empty(size, np.int64)
        self._positions, self._token_ids, self._folders = (np.empty(size, np.int32) for _ in range(3))

    @property
    def n_missing(self) -> int:
        """Rows to be added."""
        return self._batches.batch_size - self.n_rows

    @property
    def is_full(self) -> bool:
        """Whether no row is missing."""
        return self.n_missing == 0

    def add(self, fill: FillRows, rows: slice | Int64[np.ndarray, "_"]) -> None:
        """Copies rows of a fill."""
        count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
        start, stop = self.n_rows, self.n_rows + count
        for name, array in self._arrays.items():
            gather(fill.arrays[name], rows, array[start:stop])
        self._samples[start:stop] = fill.sample_idx[rows]
        self._positions[start:stop] = fill.positions[rows]
        self._token_ids[start:stop] = fill.token_ids[rows]
        self._folders[start:stop] = fill.folders[rows]
        self.n_rows = stop

    def finish(self) -> TokenBatch:
        """The batch of the rows that were added."""
        arrays = {name: array[: self.n_rows] for name, array in self._arrays.items()}
        if self._batches.restore and not self._converts:
            arrays = {VALUES: self._form.restore(arrays)}
        if self._batches.restore and self._rows.unprojection is not None:
            layers = enumerate(self._rows.layers)
            of_layers = [self._rows.unprojection(arrays[VALUES][:, slot], layer) for slot, layer in layers]
            arrays = {VALUES: np.stack(of_layers, axis=1)}
        if self._batches.is_single:
            arrays = {name: array[:, 0] for name, array in arrays.items()}
        n = self.n_rows
        index = self._samples[:n], self._positions[:n], self._token_ids[:n], self._folders[:n]
        return TokenBatch(arrays.pop(VALUES), *index, arrays)


def gather(
    array: Shaped[np.ndarray, "R L W"], rows: slice | Int64[np.ndarray, "k"], out: Shaped[np.ndarray, "k L W"]
) -> None:
    """Copies rows to `out`, in its dtype."""
    if isinstance(rows, slice):
        out[...] = array[rows]
    elif array.dtype == out.dtype:
        # Rows exist, so nothing is clipped; numpy copies twice in its other modes.
        np.take(array, rows, axis=0, out=out, mode="clip")
    else:
        block = np.empty((_BLOCK_ROWS, *array.shape[1:]), array.dtype)
        for start in range(0, len(rows), _BLOCK_ROWS):
            places = rows[start : start + _BLOCK_ROWS]
            out[start : start + len(places)] = np.take(array, places, axis=0, out=block[: len(places)], mode="clip")
