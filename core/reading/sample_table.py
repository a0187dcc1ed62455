"""The sample table of a part: what is stored of each sample beside its activations. Its content is untrusted.

Axis letters: T tokens of a sample that the model saw, K stored ones.
"""

import gzip
import json
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int32

from core.base.json_types import Kinds, require_all, require_types
from core.samples.selection import reasons_from_ranges

_ROW: Kinds = {
    "sample_idx": (int,),
    "n_tokens": (int,),
    "full_length": (int,),
    "token_ids": (list,),
    "text_preview": (str,),
    "labels": (dict,),
}


@dataclass(frozen=True)
class SampleRow:
    """One line of the sample table.

    Attributes:
      token_ids: all tokens that the model saw.
      positions: places among `token_ids` of the tokens that are stored (or were pooled).
      full_length: tokens before truncation.
      labels: the other keys of the stream's line.
      dropped: reason → ranges of tokens that are not stored; empty where all are.
    """

    sample_idx: int
    token_ids: Int32[np.ndarray, "T"]
    positions: Int32[np.ndarray, "K"]
    full_length: int
    text_preview: str
    labels: dict[str, Any]
    dropped: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def stored_token_ids(self) -> Int32[np.ndarray, "K"]:
        """The ids of the stored tokens."""
        return self.token_ids[self.positions]


def read_sample_table(stream: BinaryIO) -> tuple[SampleRow, ...]:
    """The rows of a `samples_NNNN.jsonl.gz`. Raises ValueError, EOFError or OSError for damaged bytes."""
    with gzip.open(stream, "rt", encoding="utf-8") as lines:
        return tuple(_row(json.loads(line)) for line in lines)


def _row(fields: Any) -> SampleRow:
    require_types(fields, _ROW)
    require_all(fields["token_ids"], int, "token_ids")
    token_ids = np.array(fields["token_ids"], np.int32)
    dropped = fields.get("dropped", {})
    positions = np.flatnonzero(reasons_from_ranges(dropped, len(token_ids)) == 0).astype(np.int32)
    if len(positions) != fields["n_tokens"]:
        raise ValueError(f"sample {fields['sample_idx']}: {len(positions)} tokens are stored, not {fields['n_tokens']}")
    described = {name: fields[name] for name in ("sample_idx", "full_length", "text_preview", "labels")}
    return SampleRow(token_ids=token_ids, positions=positions, dropped=dropped, **described)
