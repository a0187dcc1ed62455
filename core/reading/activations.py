"""The activations of a run, opened for reading."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from core.base.errors import UsageError
from core.reading.catalog import Catalog, read_catalog, require_alike
from core.reading.dropping import Rule, dropping
from core.reading.files import is_read_whole
from core.reading.restoring import StoredForm
from core.reading.sample_table import SampleRow
from core.reading.samples import OpenParts, SampleActivations
from core.reading.schedule import Schedule
from core.reading.shard_part import ShardPart, rows_within
from core.reading.token_batches import BatchRequest, TokenBatches
from core.reading.token_rows import RowRequest
from core.reading.unprojection import Unprojection, unprojection

BUFFER_BYTES = 512 << 20
CHUNK_BYTES = 256 << 10
OPEN_SHARDS = 16
# In order, a fill is so long: its index takes little memory, and a batch seldom lies across two.
_SPAN_BYTES = 16 << 20


def open_activations(url: str, *, projection: str | None = None) -> "Activations":
    """Opens the output of a run: a local path, `gs://` or any fsspec URL, or one worker's folder in it.

    Reads the identity and the commit records, no activations. An unfinished run has the windows that are committed now.
    projection: the file that `--project` had; with it, samples and batches are back in the space of the model.
    Raises UsageError when no window is committed there, or for another projection; RunError naming a damaged record.
    """
    catalog = read_catalog(url)
    if not catalog.parts:
        raise UsageError(f"{url}: no window with a sample is committed there yet")
    require_alike(catalog.parts)
    stored = next(iter(catalog.parts[0].sites.values())).layers
    inverse = None if projection is None else unprojection(projection, catalog.identity, stored)
    return Activations(catalog, inverse)


@dataclass(frozen=True)
class Activations:
    """The committed activations of a run."""

    catalog: Catalog
    unprojection: Unprojection | None = None

    @property
    def url(self) -> str:
        """Where they are."""
        return self.catalog.url

    @property
    def identity(self) -> dict[str, Any]:
        """What decides their bytes: the content of `run.json`."""
        return self.catalog.identity

    @property
    def parts(self) -> tuple[ShardPart, ...]:
        """The parts of all committed windows, in order: together they hold every stored sample once."""
        return self.catalog.parts

    @property
    def folders(self) -> tuple[str, ...]:
        """The workers' folders, or those of the dataset shards."""
        return tuple(dict.fromkeys(part.folder for part in self.parts))

    @property
    def sites(self) -> tuple[str, ...]:
        """The stored sites."""
        return tuple(self.parts[0].sites)

    def layers_of(self, site: str | None = None) -> tuple[int, ...]:
        """The stored layers of a site, in their stored order; site may be left out where there is one."""
        return self.parts[0].sites[self.parts[0].site(site)].layers

    @property
    def layers(self) -> tuple[int, ...]:
        """Every stored layer of any site, in order."""
        return tuple(sorted({layer for site in self.sites for layer in self.layers_of(site)}))

    @property
    def dtype(self) -> str:
        """Of the stored values: `bfloat16`, or `int8` for codes."""
        return self.parts[0].dtype

    def width(self, site: str | None = None) -> int:
        """Values of a restored row: the site's width; the projection's, if the run has one that is not given here."""
        if self.unprojection is not None:
            return self.unprojection.inverse.shape[-1]
        return self.parts[0].sites[self.parts[0].site(site)].width

    def __len__(self) -> int:
        """Stored samples."""
        return sum(part.n_samples for part in self.parts)

    @property
    def n_tokens(self) -> int:
        """Stored tokens; with pools: tokens that were pooled."""
        return sum(part.n_tokens for part in self.parts)

    def __getitem__(self, key: int | tuple[str, int]) -> SampleActivations:
        """The sample with this `sample_idx`, or (folder, sample_idx) where streams of several folders share numbers.

        Raises KeyError in one line when it is not stored, or is in several folders.
        """
        folder, sample_idx = key if isinstance(key, tuple) else (None, key)
        found = list(self._find(folder, sample_idx))
        if len(found) == 1:
            return found[0]
        if not found:
            where = self.url if folder is None else f"{self.url}/{folder}"
            raise KeyError(f"sample {sample_idx} is not stored in {where}")
        folders = ", ".join(sample.part.folder for sample in found)
        raise KeyError(
            f"sample {sample_idx} is stored in {folders}: choose one, acts[{found[0].part.folder!r}, {sample_idx}]"
        )

    def samples(self) -> Iterator[SampleActivations]:
        """Every stored sample in order, shard by shard."""
        for part in self.parts:
            for place, row in enumerate(self._table(part)):
                yield SampleActivations(part, place, row, self._open, self.unprojection)

    def tokens(
        self,
        layer: int | Sequence[int] | None = None,
        site: str | None = None,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop: Rule | Iterable[Rule] | None = None,
        tokenizer: Any = None,
        restore: bool = True,
        epochs: int | None = 1,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
        buffer_bytes: int = BUFFER_BYTES,
        chunk_bytes: int = CHUNK_BYTES,
        open_shards: int = OPEN_SHARDS,
    ) -> TokenBatches:
        """Batches of stored tokens (or pools) of one layer, or of several side by side.

        Args:
          layer: (B, D) for a number, (B, L, D) for a list; may be left out where the site has one.
          site: may be left out where the run has one.
          shuffle: see `docs/reading.md`; else the order of `samples()`.
          drop: tokens to leave out, see `core.reading.dropping.dropping`; tokenizer: for kinds of tokens.
          restore: float32, with scales applied and values of topk at their places; else as stored.
          epochs: how often all are read, each time in another order; None: without end.
          drop_last: leave out the last batch of an epoch if it is shorter.
          share: (i, n): read part i of every n, in the shuffled order where there is one; n readers with i = 0 to n - 1
            read each token once an epoch.
          buffer_bytes: rows in memory to shuffle, as stored. chunk_bytes: neighbouring rows that are read together.
          open_shards: shards that are open at once, and from which the buffer is filled.

        Raises UsageError for what is not stored or does not fit together.
        """
        first = self.parts[0]
        site = first.site(site)
        is_single = layer is None or isinstance(layer, int | np.integer)
        layers = first.layers(site, layer) if layer is not None else (first.layer(site, None),)
        form = StoredForm.of(first.sites[site], first.dtype)
        rules = dropping(drop, tokenizer)
        _check_numbers(batch_size, epochs, share, buffer_bytes, open_shards)
        if first.pools and (rules.token_ids or rules.positions):
            raise UsageError(f"{self.url}: its rows are pools ({', '.join(first.pools)}), no tokens: leave out drop")
        rows = RowRequest(self.parts, site, layers, form, rules, open_shards, self.unprojection)
        order = _schedule(rows, seed if shuffle else None, share, buffer_bytes, chunk_bytes)
        return TokenBatches(rows, order, BatchRequest(batch_size, epochs, drop_last, restore, is_single))

    @cached_property
    def _open(self) -> OpenParts:
        limit = len(self.sites) if is_read_whole(self.identity["format"]) else max(OPEN_SHARDS, len(self.sites))
        return OpenParts(limit)

    @cached_property
    def _tables(self) -> dict[ShardPart, tuple[SampleRow, ...]]:
        return {}

    def _table(self, part: ShardPart) -> tuple[SampleRow, ...]:
        """The sample table of a part; the last ones are kept."""
        if part not in self._tables:
            while len(self._tables) >= OPEN_SHARDS:
                del self._tables[next(iter(self._tables))]
            self._tables[part] = part.table()
        return self._tables[part]

    def _find(self, folder: str | None, sample_idx: int) -> Iterator[SampleActivations]:
        for part in self.parts:
            if folder in (None, part.folder) and part.first_sample_idx <= sample_idx <= part.last_sample_idx:
                for place, row in enumerate(self._table(part)):
                    if row.sample_idx == sample_idx:
                        yield SampleActivations(part, place, row, self._open, self.unprojection)

    def __getstate__(self) -> dict[str, Any]:
        # Open files stay here.
        return {"catalog": self.catalog, "unprojection": self.unprojection}


def _schedule(
    rows: RowRequest, seed: int | None, share: tuple[int, int], buffer_bytes: int, chunk_bytes: int
) -> Schedule:
    part = rows.parts[0]
    n_rows = tuple(each.n_rows for each in rows.parts)
    n_layers = len(rows.layers)
    if seed is None:
        return Schedule(n_rows, rows_within(part, rows.form, _SPAN_BYTES // n_layers), 1, share=share)
    fill_rows = max(1, buffer_bytes // rows.row_bytes)
    if is_read_whole(part.format):
        return Schedule(n_rows, max(*n_rows, 1), fill_rows, seed, 0, share)
    chunk_rows = rows_within(part, rows.form, chunk_bytes // n_layers)
    return Schedule(n_rows, chunk_rows, fill_rows, seed, rows.open_parts, share)


def _check_numbers(batch_size: int, epochs: int | None, share: tuple[int, int], buffer_bytes: int, opened: int) -> None:
    if min(batch_size, buffer_bytes, opened) < 1:
        raise UsageError("batch_size, buffer_bytes and open_shards must be positive")
    if epochs is not None and epochs < 1:
        raise UsageError(f"epochs is {epochs}: expected a positive number, or None for no end")
    if not 0 <= share[0] < share[1]:
        raise UsageError(f"share is {share}: expected (i, n) with 0 <= i < n")
