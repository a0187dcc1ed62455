"""Whitening statistics over batches, with tokens that do not count.

Axis letters: N samples, T tokens of a sample, D width of a token, K width of a whitened token.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from analysis.moments import Moments, TokenOrigins, merge
from analysis.moments.largest import UNKNOWN
from analysis.whitening.settings import WhiteningSettings
from analysis.whitening.stored_whitening import (
    metadata_of,
    reading_whitening,
    tensors_of,
    whitening_of,
    write_tensors,
)
from analysis.whitening.token_filter import TokenFilter
from analysis.whitening.whitening import Whitening
from core.base.errors import UsageError
from core.base.safetensors_file import read_metadata, read_tensors
from core.object_store.single_file import read_file

_MOMENTS = "moments/"


class IncrementalWhitener:
    """Collects moments batch by batch, then whitens: `update` for each batch, `finalize`, `transform`.

    In place of Welford's update of one row, each batch is centred on its own mean and merged by Chan's formula, which
    is the same for blocks. It may be saved after any batch: loaded again, it goes on with the same bits.

    Batches are (N, T, D), or rows (N, D) that were selected before, of any float dtype; masks and ids (N, T) or (N,).

    Attributes:
      moments: of the tokens that counted; None before the first batch.
      whitening: what `finalize` computed; None before it, and again after an update.
      n_seen: samples of all batches.
    """

    def __init__(
        self,
        settings: WhiteningSettings | None = None,
        *,
        exclude: tuple[str, ...] | list[str] = ("bos", "pad"),
        bos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> None:
        """exclude, bos_token_id, pad_token_id: see `TokenFilter`, as are the errors of `update` and `transform`."""
        self.settings = WhiteningSettings() if settings is None else settings
        self.filter = TokenFilter(tuple(exclude), bos_token_id, pad_token_id)
        self.moments: Moments | None = None
        self.whitening: Whitening | None = None
        self.n_seen = 0

    def update(self, batch: Any, attention_mask: Any = None, token_ids: Any = None) -> "IncrementalWhitener":
        """Adds the tokens of a batch that count, and returns itself.

        Raises UsageError where the filter cannot be applied or the width is another, RunError for NaN or infinity.
        """
        batch, counts, token_ids = self._checked(batch, attention_mask, token_ids)
        places = np.argwhere(counts)
        sample = self.n_seen + places[:, 0]
        position = places[:, 1] if counts.ndim > 1 else np.zeros_like(sample)
        ids = np.full(len(sample), UNKNOWN) if token_ids is None else token_ids[counts].astype(np.int64)
        found = Moments.of(batch[counts], TokenOrigins(sample, position, ids))
        self.moments = found if self.moments is None else merge(self.moments, found)
        self.n_seen += len(batch)
        self.whitening = None
        return self

    partial_fit = update

    def finalize(self) -> Whitening:
        """The whitening of all tokens so far. Raises UsageError before the first batch, RunError if nothing varies."""
        if self.moments is None:
            raise UsageError("there is no whitening of no batches: call update first")
        if self.whitening is None:
            self.whitening = Whitening.fit(self.moments, self.settings)
        return self.whitening

    def transform(self, batch: Any, attention_mask: Any = None, token_ids: Any = None) -> np.ndarray:
        """The whitened batch, float32, (N, T, K) or (N, K), in place; zeros where a token does not count.

        Raises UsageError before `finalize`. `counted` says which tokens count.
        """
        if self.whitening is None:
            raise UsageError("there is no whitening yet: call finalize first")
        batch, counts, _ = self._checked(batch, attention_mask, token_ids)
        whitened = np.zeros((*counts.shape, self.whitening.kept), np.float32)
        whitened[counts] = self.whitening.apply(batch[counts])
        return whitened

    def inverse_transform(self, whitened: Any) -> np.ndarray:
        """Tokens from whitened ones, float32. Raises UsageError before `finalize`."""
        if self.whitening is None:
            raise UsageError("there is no whitening yet: call finalize first")
        return self.whitening.invert(np.asarray(whitened))

    def counted(self, batch: Any, attention_mask: Any = None, token_ids: Any = None) -> Bool[np.ndarray, "..."]:
        """Which tokens of a batch count: (N, T) or (N,)."""
        return self._checked(batch, attention_mask, token_ids)[1]

    def save(self, url: str) -> None:
        """Writes moments, settings and the whitening, if any, to a safetensors file, local or in a bucket."""
        tensors = {} if self.moments is None else self.moments.to_arrays(_MOMENTS)
        metadata = self.settings.to_metadata()
        if self.whitening is not None:
            tensors |= tensors_of(self.whitening)
            metadata |= metadata_of(self.whitening)
        of_filter = {"exclude": " ".join(self.filter.exclude), "n_seen": str(self.n_seen)}
        ids = {"bos_token_id": self.filter.bos_token_id, "pad_token_id": self.filter.pad_token_id}
        metadata |= of_filter | {name: "" if value is None else str(value) for name, value in ids.items()}
        write_tensors(url, tensors, metadata)

    @classmethod
    def load(cls, url: str) -> "IncrementalWhitener":
        """What `save` wrote. Raises UsageError in one line for a file that is missing or another one."""
        data = read_file(url)
        with reading_whitening(url):
            tensors, metadata = read_tensors(data), read_metadata(data)
            bos, pad = (int(metadata[name]) if metadata[name] else None for name in ("bos_token_id", "pad_token_id"))
            settings, exclude = WhiteningSettings.from_metadata(metadata), tuple(metadata["exclude"].split())
            whitener = cls(settings, exclude=exclude, bos_token_id=bos, pad_token_id=pad)
            whitener.n_seen = int(metadata["n_seen"])
            if any(name.startswith(_MOMENTS) for name in tensors):
                whitener.moments = Moments.from_arrays(tensors, _MOMENTS)
            if "rank" in metadata:
                whitener.whitening = whitening_of(tensors, metadata)
        return whitener

    def _checked(
        self, batch: Any, attention_mask: Any, token_ids: Any
    ) -> tuple[Float[np.ndarray, "*tokens D"], Bool[np.ndarray, "*tokens"], np.ndarray | None]:
        """The batch, which of its tokens count, and their ids."""
        batch = np.asarray(batch)
        if batch.ndim not in (2, 3):
            raise UsageError(f"a batch of shape {batch.shape}: expected (n, seq, d) or (n, d)")
        if self.moments is not None and batch.shape[-1] != self.moments.width:
            raise UsageError(f"a batch of tokens {batch.shape[-1]} wide: those before were {self.moments.width} wide")
        mask, ids = (None if given is None else np.asarray(given) for given in (attention_mask, token_ids))
        return batch, self.filter.counted(batch.shape[:-1], mask, ids), ids
