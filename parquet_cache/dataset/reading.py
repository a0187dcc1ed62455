"""From the source to the spool: rows are filtered, checked and tokenized."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from core.base.errors import RunError, UsageError
from core.streams.sources import SourceRow
from parquet_cache.dataset.label_types import LabelTypes
from parquet_cache.dataset.row_filter import Condition, FilterError, parse_filter
from parquet_cache.dataset.row_spool import RowSpool, SpooledRow
from parquet_cache.options import PrepareOptions

# Rows that are tokenized by one call.
_CHUNK = 256


@dataclass(frozen=True)
class SetAside:
    """A row that is not exported, and why."""

    where: str
    reason: str


@dataclass
class DatasetReader:
    """Reads the rows of a source into a spool.

    Attributes:
      tokenizer: a transformers tokenizer. n_pos: the most tokens of a text; longer ones are truncated as it does it.
      n_read: rows of the source; n_filtered: those that the filter left out; n_truncated: texts cut to `n_pos`.
    """

    options: PrepareOptions
    tokenizer: Any
    n_pos: int
    set_aside: list[SetAside] = field(default_factory=list)
    n_read: int = 0
    n_filtered: int = 0
    n_truncated: int = 0
    label_types: LabelTypes = field(init=False)
    _condition: Condition | None = field(init=False)

    def __post_init__(self) -> None:
        """Raises UsageError for a filter that cannot be read."""
        self.label_types = LabelTypes(self.options.ds_label_columns)
        self._condition = None if self.options.ds_filter is None else parse_filter(self.options.ds_filter)

    def read(self, rows: Iterator[SourceRow], spool: RowSpool, limit: int | None) -> None:
        """Adds the rows that are exported to the spool, at most `limit`.

        Raises UsageError where a column is missing, RunError for a row without a text once more than
        `max_bad_records` have none.
        """
        good = self._good_rows(rows)
        while limit is None or len(spool) < limit:
            wanted = _CHUNK if limit is None else min(_CHUNK, limit - len(spool))
            chunk = list(itertools.islice(good, wanted))
            if not chunk:
                return
            self._add(chunk, spool)

    def _good_rows(self, rows: Iterator[SourceRow]) -> Iterator[SourceRow]:
        for row in tqdm(rows, desc="reading", unit="row", unit_scale=True, disable=None):
            if self.n_read == 0:
                self._check_columns(row)
            self.n_read += 1
            if not self._is_wanted(row):
                self.n_filtered += 1
                continue
            text = row.values.get(self.options.ds_input_column)
            if isinstance(text, str) and text:
                yield row
            else:
                self._put_aside(row.where, _what_is_wrong(text, self.options.ds_input_column))

    def _check_columns(self, row: SourceRow) -> None:
        for flag, names in (
            ("ds_input_column", (self.options.ds_input_column,)),
            ("ds_label_columns", self.options.ds_label_columns),
        ):
            for name in names:
                if name not in row.values:
                    has = ", ".join(row.values)
                    raise UsageError(f"{row.where}: --{flag} {name}: no such column: the columns are {has}")

    def _is_wanted(self, row: SourceRow) -> bool:
        try:
            return self._condition is None or self._condition.holds(row.values)
        except FilterError as error:
            raise RunError(f"{row.where}: {error}") from None

    def _put_aside(self, where: str, reason: str) -> None:
        self.set_aside.append(SetAside(where, reason))
        if len(self.set_aside) > self.options.max_bad_records:
            more = len(self.set_aside)
            raise RunError(f"{where}: {reason}: --max_bad_records {more} or more sets such rows aside")

    def _add(self, chunk: list[SourceRow], spool: RowSpool) -> None:
        texts = [row.values[self.options.ds_input_column] for row in chunk]
        labels = [tuple(row.values.get(name) for name in self.options.ds_label_columns) for row in chunk]
        added = []
        for row, text, ids, of_row in zip(chunk, texts, self._token_ids(texts), labels, strict=True):
            if not len(ids):
                self._put_aside(row.where, "the tokenizer finds no tokens in its text")
                continue
            spool.add(SpooledRow(row.where, np.asarray(ids, np.int32), of_row), text)
            added.append(of_row)
        if added:
            self.label_types.see(added, f"{chunk[0].where} to {chunk[-1].where}")

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        plain = {"return_attention_mask": False, "verbose": False}
        ids: list[list[int]] = self.tokenizer(texts, **plain)["input_ids"]
        for place, whole in enumerate(ids):
            if len(whole) > self.n_pos:
                cut = self.tokenizer(texts[place], truncation=True, max_length=self.n_pos, **plain)["input_ids"]
                self.n_truncated += 1
                ids[place] = cut
        return ids


def _what_is_wrong(text: Any, column: str) -> str:
    if text is None:
        return f"{column} is null"
    return f"{column} is empty" if text == "" else f"{column} is {text!r:.40}, not a text"
