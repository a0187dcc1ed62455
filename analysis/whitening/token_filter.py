"""Which tokens of a padded batch count.

Axis letters: N samples, T tokens of a sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Integer, Shaped

from core.base.errors import UsageError

EXCLUDABLE = ("bos", "pad", "first")


@dataclass(frozen=True)
class TokenFilter:
    """What to leave out of batches; a value that cannot be is a UsageError.

    Attributes:
      exclude: some of `bos`: tokens with the id `bos_token_id`, none where the tokenizer has no such token; `pad`:
        tokens that the attention mask does not attend to, or without a mask those with the id `pad_token_id`; `first`:
        the first token of each sample that is not padding, which is the attention sink of many models.
    """

    exclude: tuple[str, ...] = ("bos", "pad")
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        unknown = [kind for kind in self.exclude if kind not in EXCLUDABLE]
        if unknown:
            raise UsageError(f"exclude {', '.join(unknown)}: expected some of {', '.join(EXCLUDABLE)}")

    def counted(
        self,
        shape: Sequence[int],
        attention_mask: Shaped[np.ndarray, "..."] | None,
        token_ids: Integer[np.ndarray, "..."] | None,
    ) -> Bool[np.ndarray, "..."]:
        """Which tokens of a batch count. shape: (N, T), or (N,) for rows that were selected before.

        Raises UsageError where a rule cannot be applied for want of the mask or the ids.
        """
        for name, given in (("attention_mask", attention_mask), ("token_ids", token_ids)):
            if given is not None and given.shape != tuple(shape):
                raise UsageError(f"{name} has shape {given.shape}: the batch has {tuple(shape)} tokens")
        is_real = self._unpadded(shape, attention_mask, token_ids)
        counts = is_real.copy() if "pad" in self.exclude else np.ones(shape, bool)
        if "bos" in self.exclude and self.bos_token_id is not None:
            if token_ids is not None:
                counts &= token_ids != self.bos_token_id
            elif len(shape) > 1:
                raise UsageError("exclude bos: needs token_ids to find them")
        if "first" in self.exclude:
            if len(shape) < 2:
                raise UsageError("exclude first: rows (n, d) have no samples; give a batch (n, seq, d)")
            counts &= ~(is_real & (np.cumsum(is_real, axis=1) == 1))
        return counts

    def _unpadded(
        self,
        shape: Sequence[int],
        attention_mask: Shaped[np.ndarray, "..."] | None,
        token_ids: Integer[np.ndarray, "..."] | None,
    ) -> Bool[np.ndarray, "..."]:
        # The mask decides where there is one: many tokenizers pad with a token that texts contain too.
        if attention_mask is not None:
            return attention_mask != 0
        if token_ids is not None and self.pad_token_id is not None:
            return token_ids != self.pad_token_id
        if len(shape) > 1 and "pad" in self.exclude:
            raise UsageError("exclude pad: needs attention_mask, or token_ids and pad_token_id")
        return np.ones(shape, bool)
