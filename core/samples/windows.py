"""Windows: runs of consecutive samples of one stream, cut where the stored bytes reach the shard size.

A window is the unit of packing, of output files, of commit and of resume. Its end depends only on token counts (of
tokens that may be stored, and of tokens that the model sees), so it is known before any forward pass and is the same
on every worker.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from core.dataset_utils import BadRecord

# The cost of a token that is computed but not stored: its id, in memory and in the sample table. It bounds a window
# whose samples store next to nothing.
TOKEN_ID_BYTES = 4


@dataclass(frozen=True)
class TokenizedSample:
    """One sample, ready for the model.

    Attributes:
      sample_idx: its position in the stream (for ARC: task position × predictions + prediction).
      position: of its record among the lines of the stream; samples_per_record: how many samples the record makes.
      token_ids: (T,) what the model sees, after truncation.
      full_length: tokens before truncation.
      text_preview: at most 200 characters, for people.
      labels: the record's other keys, as they were in the stream.
      reasons: (T,) why each token is not stored, 0 for one that is (`core.samples.selection`); None: all are stored.
      most_kept: maximum number of stored tokens among those without a reason, until norms have decided; None: all.
      n_pools: how many vectors are stored instead of its tokens; 0: the tokens themselves.
    """

    sample_idx: int
    position: int
    samples_per_record: int
    token_ids: Int32[np.ndarray, "T"]
    full_length: int
    text_preview: str
    labels: dict[str, Any] = field(default_factory=dict)
    reasons: UInt8[np.ndarray, "T"] | None = None
    most_kept: int | None = None
    n_pools: int = 0

    @property
    def n_kept(self) -> int:
        """How many tokens are stored; an upper bound until norms have decided."""
        if self.reasons is None:
            return len(self.token_ids)
        return len(self.kept) if self.most_kept is None else self.most_kept

    @property
    def n_rows(self) -> int:
        """How many rows its stored arrays have: one per token, or one per pool if a token is left."""
        return min(1, self.n_kept) * self.n_pools if self.n_pools else self.n_kept

    @property
    def kept(self) -> Int64[np.ndarray, "K"]:
        """The positions of the stored tokens, ascending."""
        return np.arange(len(self.token_ids)) if self.reasons is None else np.flatnonzero(self.reasons == 0)


@dataclass(frozen=True)
class StreamPlace:
    """Where a resumed run continues: the record to read first, and its first sample that is still missing."""

    position: int
    sample_idx: int


@dataclass(frozen=True)
class Window:
    """Window `index` (from 1) of a stream; `next_place` is None when the stream ends with it."""

    index: int
    samples: tuple[TokenizedSample, ...]
    bad_records: tuple[BadRecord, ...]
    next_place: StreamPlace | None

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sample that the model sees."""
        return [len(sample.token_ids) for sample in self.samples]

    @property
    def samples_per_record(self) -> int:
        """Samples that each record of the stream makes."""
        return self.samples[0].samples_per_record

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples that the model sees."""
        return sum(self.lengths)

    @property
    def n_kept(self) -> int:
        """Stored tokens of all samples; an upper bound until norms have decided."""
        return sum(sample.n_kept for sample in self.samples)

    @property
    def n_rows(self) -> int:
        """Rows of the stored arrays; an upper bound until norms have decided."""
        return int(self.offsets[-1])

    @cached_property
    def offsets(self) -> Int64[np.ndarray, "S_plus_1"]:
        """Where the stored rows of each sample begin among those of the window, and the end."""
        return np.concatenate([[0], np.cumsum([sample.n_rows for sample in self.samples], dtype=np.int64)])


def cut_windows(
    items: Iterable[TokenizedSample | BadRecord], *, bytes_per_row: int, shard_bytes: int, first_index: int = 1
) -> Iterator[Window]:
    """Yields the windows of a stream in order.

    A window ends at the first sample with which the bytes of its largest file, or of the token ids of its samples,
    reach `shard_bytes`. It is yielded only when the next sample or the end of the stream is seen, so that bad records
    after it belong to it and the last window has `next_place` None. Bad records alone make no window: a stream without
    a usable sample yields none.

    Args:
      bytes_per_row: bytes that a stored row (a token or a pool) adds to the largest file of a window.
    """
    samples: list[TokenizedSample] = []
    bad_records: list[BadRecord] = []
    stored = ids = 0
    index = first_index
    for item in items:
        if isinstance(item, BadRecord):
            bad_records.append(item)
            continue
        if max(stored, ids) >= shard_bytes:
            yield Window(index, tuple(samples), tuple(bad_records), StreamPlace(item.position, item.sample_idx))
            samples, bad_records, stored, ids = [], [], 0, 0
            index += 1
        samples.append(item)
        stored += item.n_rows * bytes_per_row
        ids += len(item.token_ids) * TOKEN_ID_BYTES
    if samples:
        yield Window(index, tuple(samples), tuple(bad_records), None)
