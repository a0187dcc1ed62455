"""The hidden states of texts as transformers numbers them, from captures of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int32

from core.backends import choose_backend
from core.base.errors import RunError, UsageError
from core.in_memory.capturer import Capturer, load_capturer
from core.step.backend import Backend
from core.step.model_shape import ModelShape, check_sample_length
from parquet_cache.batch_size import with_batch_size
from parquet_cache.options import PrepareOptions
from parquet_cache.parquet.state_pages import State


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model before its weights are loaded.

    Attributes:
      layers: the blocks whose residual is stored, ascending. n_pos: the most tokens of a text.
    """

    engine: Backend
    shape: ModelShape
    layers: tuple[int, ...]
    n_pos: int


def model_facts(options: PrepareOptions) -> ModelFacts:
    """Raises UsageError for layers or a length that the model does not have, ModelError for the model."""
    path = options.model_checkpoint
    engine = choose_backend(options.backend, path, options.revision, trust_remote_code=options.trust_remote_code)
    shape = engine.model_shape(path, options.revision)
    layers = tuple(range(shape.n_layers)) if options.layers is None else tuple(sorted(set(options.layers)))
    if not layers or not 0 <= layers[0] <= layers[-1] < shape.n_layers:
        raise UsageError(f"--layers: {path} has layers 0 to {shape.n_layers - 1}")
    n_pos = shape.max_positions if options.n_pos is None else options.n_pos
    check_sample_length(n_pos, shape, path, "--n_pos")
    return ModelFacts(engine, shape, layers, n_pos)


@dataclass(frozen=True)
class StateReader:
    """The loaded model; `load_states` makes it.

    Attributes:
      blocks: gives the residual after each block. embedding: gives what the first block reads, where it is asked for.
    """

    blocks: Capturer
    embedding: Capturer | None

    def with_batch_size(self, n_texts: int) -> "StateReader":
        """The same, computing `n_texts` texts in a step."""
        embedding = None if self.embedding is None else with_batch_size(self.embedding, n_texts)
        return replace(self, blocks=with_batch_size(self.blocks, n_texts), embedding=embedding)

    def __call__(self, texts: Sequence[Int32[np.ndarray, "_"]], where: Sequence[str]) -> list[list[State]]:
        """Of each text the (T, D) arrays of its layers, the embedding first.

        where: what messages call the texts. Raises RunError for values that are not finite or do not fit the dtype.
        """
        try:
            layers = list(self.blocks(texts)["residual"].values())
            if self.embedding is not None:
                layers = [self.embedding(texts)["resid_pre"][0], *layers]
        except RunError as error:
            raise RunError(_named(str(error), where)) from error
        return [list(of_text) for of_text in zip(*layers, strict=True)]


def _named(message: str, where: Sequence[str]) -> str:
    """The message of a capture, with the row's place in the dataset instead of its number in the batch."""
    for place, name in enumerate(where):
        message = message.replace(f"samples[{place}]", name)
    return message


def load_states(options: PrepareOptions, facts: ModelFacts, longest: int) -> StateReader:
    """Loads the weights. longest: the most tokens of a text that will be given. Raises ModelError, UsageError."""

    def load(site: str, layers: Sequence[int]) -> Capturer:
        return load_capturer(
            options.model_checkpoint,
            layers=layers,
            sites=site,
            dtype=options.dtype,
            revision=options.revision,
            backend=options.backend,
            compute_dtype=options.compute_dtype,
            trust_remote_code=options.trust_remote_code,
            max_seq_length=longest,
        )

    embedding = load("resid_pre", [0]) if options.with_embedding else None
    return StateReader(load("residual", facts.layers), embedding)
