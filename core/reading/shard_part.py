"""One part of one committed window: the unit that passes over shards are built on.

Axis letters: S samples of the part, N stored rows of all of them, one after the other, k rows of a range, W values of a
stored row, D values of a restored one. A row is a stored token, or one of the vectors that a sample's tokens were
pooled to.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped

from core.base.errors import UsageError
from core.commit.record import StoredFile, StoredSite
from core.object_store.shared import shared_store
from core.reading.damage import damage
from core.reading.files import ExpectedRows, RowFile, open_ranges, open_rows
from core.reading.restoring import StoredForm
from core.reading.sample_table import SampleRow, read_sample_table
from core.shards.formats.planes_shard import BLOCK_BYTES

NO_PLACE = -1
"""The position and token id of a row that is a pool."""


@dataclass(frozen=True)
class ShardPart:
    """A reference to one part of one committed window, of a few kilobytes: no open file, no array.

    It is picklable and needs nothing but itself: `part.read(site, layers)` works in another process or on another
    machine that reaches `root`. `acts.parts` lists the parts of a run in order; together they hold every stored sample
    once. Two parts are equal if they name the same files with the same checksums at the same root.

    Attributes:
      root: path or URL of the output, where `run.json` is.
      folder: the worker's folder below it, such as `tpu_0` or `shard_000`.
      window: its number, from 1. part: its index among the parts of the window, 0 where windows are not cut.
      format: the name of the shard format.
      n_samples, n_tokens: samples, and stored tokens (with pools: tokens that were pooled).
      first_sample_idx, last_sample_idx: of its samples; they need not be consecutive.
      n_rows: rows of each array; with pools it may be less, where samples have no token left.
      dtype: of the stored values.
      sites: by name, layer numbers and width as the commit record has them.
      pools: the vectors that are stored of a sample instead of its tokens; empty: a row for each token.
      files: the sample table (site None), then one shard file a site, with sizes and checksums.
    """

    root: str
    folder: str
    window: int
    part: int
    format: str
    n_samples: int
    n_tokens: int
    first_sample_idx: int
    last_sample_idx: int
    n_rows: int
    dtype: str
    sites: Mapping[str, StoredSite] = field(repr=False, hash=False)
    pools: tuple[str, ...]
    files: tuple[StoredFile, ...] = field(repr=False)

    def read(self, site: str | None = None, layers: int | Sequence[int] | None = None) -> "PartRows":
        """Opens the part at one site.

        site: may be left out where the run has one. layers: one, several, or None for all of the site's.
        Only the index of the file is read (a pickle is read whole); arrays are read when they are asked for.
        Raises UsageError for a site or layer that is not stored, RunError naming a file that is damaged or missing.
        """
        site = self.site(site)
        wanted = self.layers(site, layers)
        file = self._file(site)
        stored = self.sites[site]
        form = StoredForm.of(stored, self.dtype)
        n_rows = None if self.pools else self.n_rows
        expected = ExpectedRows(
            site, stored.layers, form.arrays, self.n_samples, n_rows, gzipped=file.name.endswith(".gz")
        )
        with damage(self.root, f"{self.folder}/{file.name}"):
            ranges = open_ranges(shared_store(self.root), f"{self.folder}/{file.name}", file.bytes)
            return PartRows(self, site, wanted, form, open_rows(self.format, ranges, expected))

    def table(self) -> tuple[SampleRow, ...]:
        """The rows of its sample table, in the order of the samples. Raises RunError if it is damaged or missing."""
        file = self._file(None)
        with damage(self.root, f"{self.folder}/{file.name}"):
            with shared_store(self.root).open(f"{self.folder}/{file.name}") as stream:
                rows = read_sample_table(stream)
            if len(rows) != self.n_samples:
                raise ValueError(f"it has {len(rows)} samples, its record says {self.n_samples}")
            return rows

    def site(self, name: str | None) -> str:
        """The name itself, or the only site. Raises UsageError."""
        if name is None and len(self.sites) == 1:
            return next(iter(self.sites))
        if name is None or name not in self.sites:
            what = "several sites are stored" if name is None else f"site {name!r} is not stored"
            raise UsageError(f"{self.root}: {what}: choose one of {', '.join(self.sites)}")
        return name

    def layers(self, site: str, layers: int | Sequence[int] | None) -> tuple[int, ...]:
        """The layers that are asked for, as a tuple. Raises UsageError."""
        stored = self.sites[site].layers
        wanted = (
            stored
            if layers is None
            else (int(layers),)
            if isinstance(layers, int | np.integer)
            else tuple(map(int, layers))
        )
        missing = [layer for layer in wanted if layer not in stored]
        if missing or not wanted:
            what = f"layer {missing[0]} of {site} is not stored" if missing else f"no layer of {site} is asked for"
            raise UsageError(f"{self.root}: {what}: choose from {', '.join(map(str, stored))}")
        return wanted

    def layer(self, site: str, layer: int | None) -> int:
        """The layer itself, or the only one of the site. Raises UsageError."""
        wanted = self.layers(site, layer)
        if len(wanted) > 1:
            raise UsageError(
                f"{self.root}: several layers of {site} are stored: choose from {', '.join(map(str, wanted))}"
            )
        return wanted[0]

    def _file(self, site: str | None) -> StoredFile:
        return next(file for file in self.files if file.site == site)


@dataclass(frozen=True)
class PartRows:
    """The rows of a part at one site: sample s owns rows offsets[s] to offsets[s + 1] of every layer.

    Methods raise RunError naming the file when its bytes are damaged. Not picklable: send the part and read it there.
    """

    part: ShardPart
    site: str
    layers: tuple[int, ...]
    form: StoredForm
    _file: RowFile = field(repr=False)

    @property
    def n_rows(self) -> int:
        """N."""
        return int(self.offsets[-1])

    @property
    def sample_idx(self) -> Int64[np.ndarray, "S"]:
        """The number of each sample."""
        return self._file.sample_idx

    @property
    def offsets(self) -> Int64[np.ndarray, "S_plus_1"]:
        """Where the rows of each sample begin."""
        return self._file.offsets

    @cached_property
    def samples(self) -> tuple[SampleRow, ...]:
        """The rows of the sample table: token ids, labels, previews. Reads the table, once."""
        rows = self.part.table()
        with self._damage():
            if len(rows) != len(self.sample_idx):
                raise ValueError("its samples are not those of the sample table")
        for place, row in enumerate(rows):
            self.span_of(place, row)
        return rows

    @cached_property
    def sample_lengths(self) -> Int64[np.ndarray, "S"]:
        """The tokens of each sample that the model saw. Reads the sample table where some are not stored."""
        if self._has_all_tokens:
            return np.diff(self.offsets)
        return np.array([len(row.token_ids) for row in self.samples], np.int64)

    def stored(self, layer: int, start: int = 0, stop: int | None = None) -> dict[str, Shaped[np.ndarray, "k _"]]:
        """Rows start to stop - 1 as they are stored: `activation`, and where reduced `scale` and `indices`.

        Arrays may be read-only views of the mapped file.
        """
        stop = self.n_rows if stop is None else stop
        with self._damage():
            return {name: self._file.rows(layer, name, start, stop) for name in self.form.arrays}

    def rows(self, layer: int, start: int = 0, stop: int | None = None) -> Float32[np.ndarray, "k D"]:
        """Rows start to stop - 1 as float32: codes times their scales, values of topk at their places.

        Projected rows stay in the projected space.
        """
        return self.form.restore(self.stored(layer, start, stop))

    def span_of(self, place: int, row: SampleRow) -> tuple[int, int]:
        """The rows (start, stop) of sample number `place` of the part, whose line in the sample table is `row`."""
        start, stop = self.offsets[place : place + 2].tolist()
        n_rows = stop - start if not self.part.pools else len(row.positions)
        with self._damage():
            if (self.sample_idx[place], n_rows) != (row.sample_idx, len(row.positions)):
                raise ValueError("its samples are not those of the sample table")
        return start, stop

    def sample_of_rows(self, start: int = 0, stop: int | None = None) -> Int64[np.ndarray, "k"]:
        """The index within the part (0 to S - 1) of the sample of each row."""
        rows = np.arange(start, self.n_rows if stop is None else stop)
        return np.searchsorted(self.offsets, rows, side="right").astype(np.int64) - 1

    def token_index(
        self, spans: Sequence[tuple[int, int]]
    ) -> tuple[Int64[np.ndarray, "k"], Int32[np.ndarray, "k"], Int32[np.ndarray, "k"]]:
        """Which tokens the rows of these ranges are: `sample_of_rows`, `positions` and `token_ids` of all of them."""
        numbers = np.concatenate([np.arange(start, stop) for start, stop in spans])
        samples = np.searchsorted(self.offsets, numbers, side="right").astype(np.int64) - 1
        token_ids = np.concatenate([self.token_ids(start, stop) for start, stop in spans])
        if self._has_all_tokens:
            return samples, (numbers - self.offsets[samples]).astype(np.int32), token_ids
        return samples, np.concatenate([self.positions(start, stop) for start, stop in spans]), token_ids

    def positions(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "k"]:
        """The place of each row's token in its sample; -1 for pools."""
        stop = self.n_rows if stop is None else stop
        if self.part.pools:
            return np.full(stop - start, NO_PLACE, np.int32)
        with self._damage():
            stored = self._file.positions(start, stop)
        if stored is not None:
            return stored
        return (np.arange(start, stop) - self.offsets[self.sample_of_rows(start, stop)]).astype(np.int32)

    def token_ids(self, start: int = 0, stop: int | None = None) -> Int32[np.ndarray, "k"]:
        """The token id of each row; -1 for pools."""
        stop = self.n_rows if stop is None else stop
        if self.part.pools:
            return np.full(stop - start, NO_PLACE, np.int32)
        with self._damage():
            stored = self._file.token_ids(start, stop)
        return self._table_token_ids[start:stop] if stored is None else stored

    def spans(self, max_bytes: int = 64 << 20) -> Iterator[tuple[int, int]]:
        """Cuts the rows into ranges (start, stop) of at most `max_bytes` a layer, for one range in memory at a time.

        A range is at least one row, and for planes whole blocks of 4 MiB.
        """
        step = rows_within(self.part, self.form, max_bytes)
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)

    @cached_property
    def _has_all_tokens(self) -> bool:
        """Whether every token of its samples has a row."""
        with self._damage():
            return not self.part.pools and self._file.positions(0, 0) is None

    @cached_property
    def _table_token_ids(self) -> Int32[np.ndarray, "N"]:
        return np.concatenate([np.empty(0, np.int32), *(row.stored_token_ids for row in self.samples)])

    def _damage(self) -> AbstractContextManager[None]:
        return damage(self.part.root, f"{self.part.folder}/{self.part._file(self.site).name}")


def rows_within(part: ShardPart, form: StoredForm, max_bytes: int) -> int:
    """How many rows of one layer take at most `max_bytes` as stored: at least one, for planes whole blocks."""
    row_bytes = sum(array.row_bytes for array in form.arrays.values())
    rows = max(1, max_bytes // row_bytes)
    return rows if part.format != "planes" else max(1, rows // _block_rows(form)) * _block_rows(form)


def _block_rows(form: StoredForm) -> int:
    """The rows of a block of a planes file."""
    return max(1, BLOCK_BYTES // form.arrays["activation"].row_bytes)
