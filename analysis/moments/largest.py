"""The tokens with the largest norms, and where they come from: attention sinks are among them.

Axis letters: N rows, K tokens that are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

UNKNOWN = -1
"""The token id of a row of which only the place is known."""


@dataclass(frozen=True, eq=False)
class TokenOrigins:
    """Where N rows come from.

    Attributes:
      sample: `sample_idx`, the sample's place in the stream.
      position: the token's place in its sample, from 0.
      token_id: of the tokenizer, or `UNKNOWN`.
    """

    sample: Int64[np.ndarray, "N"]
    position: Int64[np.ndarray, "N"]
    token_id: Int64[np.ndarray, "N"]

    @classmethod
    def of_rows(cls, n_rows: int, first: int = 0) -> "TokenOrigins":
        """Rows without samples: row i of a data set is sample i, at position 0."""
        sample = np.arange(first, first + n_rows, dtype=np.int64)
        return cls(sample, np.zeros(n_rows, np.int64), np.full(n_rows, UNKNOWN, np.int64))

    def taken(self, places: np.ndarray) -> "TokenOrigins":
        """Those at an index of numpy: places, a mask or a slice."""
        return TokenOrigins(self.sample[places], self.position[places], self.token_id[places])

    def __len__(self) -> int:
        return len(self.sample)


@dataclass(frozen=True, eq=False)
class LargestTokens:
    """At most `limit` tokens, largest norm first, equal norms by sample and position: merging has no order."""

    limit: int
    norm: Float64[np.ndarray, "K"]
    origins: TokenOrigins

    @classmethod
    def of(cls, norms: Float64[np.ndarray, "N"], origins: TokenOrigins, limit: int) -> "LargestTokens":
        """The largest of N tokens."""
        candidates = np.arange(len(norms))
        if len(norms) > limit > 0:
            least = np.partition(norms, len(norms) - limit)[len(norms) - limit]
            candidates = np.flatnonzero(norms >= least)
        keys = (origins.position[candidates], origins.sample[candidates], -norms[candidates])
        best = candidates[np.lexsort(keys)[:limit]]
        return cls(limit, norms[best], origins.taken(best))

    def merged(self, other: "LargestTokens") -> "LargestTokens":
        """The largest of both. Raises ValueError if they keep different numbers."""
        if self.limit != other.limit:
            raise ValueError(f"the {self.limit} and the {other.limit} largest tokens cannot be merged")
        pairs = zip(_columns(self.origins), _columns(other.origins), strict=True)
        origins = TokenOrigins(*(np.concatenate(pair) for pair in pairs))
        return LargestTokens.of(np.concatenate([self.norm, other.norm]), origins, self.limit)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """By name, for `from_arrays`."""
        table = np.stack(_columns(self.origins), axis=1)
        return {"largest_norm": self.norm, "largest_origin": table, "largest_limit": np.array([self.limit])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "LargestTokens":
        """The inverse of `to_arrays`."""
        origins = TokenOrigins(*(column.copy() for column in arrays["largest_origin"].T))
        return cls(int(arrays["largest_limit"][0]), arrays["largest_norm"], origins)

    def to_json(self) -> list[dict[str, float | int]]:
        """One object for each token."""
        columns = zip(self.norm.tolist(), *(column.tolist() for column in _columns(self.origins)), strict=True)
        return [{"norm": norm, "sample_idx": s, "position": p, "token_id": t} for norm, s, p, t in columns]


def _columns(origins: TokenOrigins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return origins.sample, origins.position, origins.token_id
