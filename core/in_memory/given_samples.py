"""Samples as a caller gives them: texts, or token ids, one or many."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32

from core.base.errors import UsageError
from core.step.model_shape import ModelShape

Sample = str | Sequence[int] | np.ndarray


def as_many(samples: Sample | Sequence[Sample]) -> list[Any]:
    """A list of samples; one text, or one list of token ids, becomes a list of one. Raises UsageError."""
    if not hasattr(samples, "__len__"):
        raise UsageError("samples: a text, a list of token ids, or a list of such")
    if isinstance(samples, str):
        return [samples]
    is_one = len(samples) > 0 and not isinstance(samples[0], str) and np.ndim(samples[0]) == 0
    return [samples] if is_one else list(samples)


def token_ids_of(samples: Sequence[Sample], tokenizer: Any) -> list[Int32[np.ndarray, "_"]]:
    """The token ids of each sample; texts are tokenized with the tokenizer's defaults, in one call.

    tokenizer: a transformers tokenizer, needed for texts alone. Raises UsageError for what is no sample.
    """
    texts = [sample for sample in samples if isinstance(sample, str)]
    encoded = iter(tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"] if texts else ())
    ids = [next(encoded) if isinstance(sample, str) else sample for sample in samples]
    for place, one in enumerate(ids):
        if not len(one):
            raise UsageError(f"samples[{place}]: it has no tokens")
        if not np.issubdtype(np.asarray(one).dtype, np.integer):
            raise UsageError(f"samples[{place}]: neither a text nor a list of token ids")
    return [np.asarray(one, np.int32) for one in ids]


def check_token_ids(samples: Sequence[Int32[np.ndarray, "_"]], shape: ModelShape, name: str) -> None:
    """Raises UsageError for a sample with token ids that the model does not have, or with too many tokens."""
    for place, ids in enumerate(samples):
        if not 0 <= int(ids.min()) <= int(ids.max()) < shape.vocab_size:
            raise UsageError(f"samples[{place}]: its token ids are not all in 0..{shape.vocab_size - 1}")
        if len(ids) > shape.max_positions:
            raise UsageError(f"samples[{place}]: {len(ids)} tokens, and {name} knows {shape.max_positions} positions")
