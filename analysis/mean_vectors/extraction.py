"""From texts to their vectors, with a model that is loaded once.

Axis letters: S samples, L layers, P pools, D d_model, W width of a vector.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from analysis.mean_vectors.modes import pools_of, vectors_of
from core.base.errors import RunError
from core.in_memory.capturer import Capturer, load_capturer

_SITE = "residual"


@dataclass(frozen=True)
class TextVectors:
    """The vectors of some texts.

    Attributes:
      vectors: by mode, one row for each text that has not failed, in order.
      failed: the reason, by place among the texts. truncated: places of the texts that were cut.
    """

    vectors: dict[str, Float32[np.ndarray, "_ _"]]
    failed: dict[int, str]
    truncated: tuple[int, ...]


@dataclass(frozen=True)
class VectorExtractor:
    """A loaded model and the modes of vectors that it gives; `load_extractor` makes it."""

    capturer: Capturer
    modes: tuple[str, ...]
    max_seq_length: int
    overlong: str

    def __call__(self, texts: Sequence[str]) -> TextVectors:
        """The vectors of texts; a text without tokens, with too many or with NaN fails, and no other does.

        Where the model computes NaN, all the texts are run again one by one: in a row of a step they share blocks, in
        which NaN spreads.
        """
        ids, failed, truncated = self._token_ids(texts)
        pooled = self._pooled(ids, failed)
        failed = dict(sorted(failed.items()))
        shape = (len(self._layers), len(self._pools), self.capturer.shape.d_model)
        rows = np.stack([pooled[place] for place in sorted(pooled)]) if pooled else np.zeros((0, *shape), np.float32)
        vectors = {mode: vectors_of(rows, self._pools, mode) for mode in self.modes}
        return TextVectors(vectors, failed, tuple(place for place in truncated if place not in failed))

    @property
    def _pools(self) -> tuple[str, ...]:
        return pools_of(self.modes)

    @property
    def _layers(self) -> tuple[int, ...]:
        return self.capturer.layers[_SITE]

    def _token_ids(self, texts: Sequence[str]) -> tuple[dict[int, list[int]], dict[int, str], list[int]]:
        """The token ids of each text by its place, the reasons of those that have failed, and which were cut."""
        failed = {place: "half of a surrogate pair" for place, text in enumerate(texts) if not _is_unicode(text)}
        places = [place for place in range(len(texts)) if place not in failed]
        tokenizer: Any = self.capturer.tokenizer
        encoded = tokenizer([texts[place] for place in places], return_attention_mask=False, verbose=False)
        found = dict(zip(places, encoded["input_ids"], strict=True)) if places else {}
        longest = self.max_seq_length
        failed |= {place: "no tokens" for place, ids in found.items() if not len(ids)}
        overlong = [place for place, ids in found.items() if len(ids) > longest]
        if self.overlong == "refuse":
            failed |= {place: f"{len(found[place])} tokens, more than {longest}" for place in overlong}
            overlong = []
        return {place: ids[:longest] for place, ids in found.items() if place not in failed}, failed, overlong

    def _pooled(self, ids: Mapping[int, list[int]], failed: dict[int, str]) -> dict[int, Float32[np.ndarray, "L P D"]]:
        """The pools of each text by its place; adds those that the model cannot compute to `failed`."""
        try:
            return self._run(ids)
        except RunError:
            pooled: dict[int, Float32[np.ndarray, "L P D"]] = {}
            for place, one in ids.items():
                try:
                    pooled |= self._run({place: one})
                except RunError as error:
                    failed[place] = str(error).removeprefix("samples[0], ").partition(": try ")[0]
            return pooled

    def _run(self, ids: Mapping[int, list[int]]) -> dict[int, Float32[np.ndarray, "L P D"]]:
        if not ids:
            return {}
        by_layer = self.capturer(list(ids.values()))[_SITE]
        return {place: np.stack([by_layer[layer][i] for layer in self._layers]) for i, place in enumerate(ids)}


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_extractor(
    model_path: str,
    *,
    modes: Sequence[str],
    layers: Sequence[int],
    max_seq_length: int,
    overlong: str,
    revision: str | None = None,
    backend: str = "auto",
    compute_dtype: str = "auto",
    trust_remote_code: bool = False,
    rows_per_step: int = 4,
) -> VectorExtractor:
    """Loads the layers of the model up to the last of `layers`. Arguments and errors as of `MeanOptions`, `capture`."""
    capturer = load_capturer(
        model_path,
        layers=layers,
        sites=_SITE,
        pool=pools_of(modes),
        revision=revision,
        backend=backend,
        compute_dtype=compute_dtype,
        trust_remote_code=trust_remote_code,
        # Rows of one set of lengths for all batches, so that no batch compiles programs of its own.
        max_seq_length=max_seq_length,
        batch_size=rows_per_step,
    )
    return VectorExtractor(capturer, tuple(modes), max_seq_length, overlong)
