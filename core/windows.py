"""Windows: runs of consecutive samples of one stream, cut where the stored bytes reach the shard size.

A window is the unit of packing, of output files, of commit and of resume. Where it ends depends on token counts alone,
so it is known before any forward pass and is the same on every worker.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int32

from core.dataset_utils import BadRecord


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
    """

    sample_idx: int
    position: int
    samples_per_record: int
    token_ids: Int32[np.ndarray, "T"]
    full_length: int
    text_preview: str
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StreamPlace:
    """Where a resumed run goes on: the record to read first and the first sample of it that is still missing."""

    position: int
    sample_idx: int


@dataclass(frozen=True)
class Window:
    """Window `index` (from 1) of a stream; `next_place` is None when the stream ends with it."""

    index: int
    samples: tuple[TokenizedSample, ...]
    bad_records: tuple[BadRecord, ...]
    next_place: StreamPlace | None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [len(sample.token_ids) for sample in self.samples]

    @property
    def samples_per_record(self) -> int:
        """Samples that each record of the stream makes."""
        return self.samples[0].samples_per_record

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples."""
        return sum(self.lengths)


def cut_windows(
    items: Iterable[TokenizedSample | BadRecord], *, bytes_per_token: int, shard_bytes: int, first_index: int = 1
) -> Iterator[Window]:
    """Yields the windows of a stream in order.

    A window closes at the first sample with which its stored bytes reach `shard_bytes`. It is handed on only when the
    next sample or the end is seen, so that bad records behind it belong to it and the last window knows that it is.
    Bad records alone make no window: a stream without a usable sample yields none.
    """
    samples: list[TokenizedSample] = []
    bad_records: list[BadRecord] = []
    stored = 0
    index = first_index
    for item in items:
        if isinstance(item, BadRecord):
            bad_records.append(item)
            continue
        if stored >= shard_bytes:
            yield Window(index, tuple(samples), tuple(bad_records), StreamPlace(item.position, item.sample_idx))
            samples, bad_records, stored = [], [], 0
            index += 1
        samples.append(item)
        stored += len(item.token_ids) * bytes_per_token
    if samples:
        yield Window(index, tuple(samples), tuple(bad_records), None)
