"""Batches of tokens as a Grain dataset. Imports grain."""

from typing import Any

import grain
import numpy as np

from core.reading.activations import Activations
from core.reading.token_batches import TokenBatches

Arrays = dict[str, np.ndarray]


class GrainTokens(grain.IterDataset[Arrays]):
    """Batches of tokens as dicts of arrays, for Grain's transformations and its checkpoints."""

    def __init__(self, acts: Activations, **settings: Any) -> None:
        super().__init__()
        acts.tokens(**settings)  # what does not fit is refused here, not in a worker
        self._acts, self._settings = acts, settings

    def __iter__(self) -> "GrainIterator":
        return GrainIterator(self._acts.tokens(**self._settings))

    def set_slice(self, sl: slice, sequential_slice: bool = False) -> None:
        """Grain's worker i of n reads slice(i, None, n): it gets that share of this share of the shards."""
        first, n = self._settings.get("share", (0, 1))
        step = sl.step or 1
        self._settings = self._settings | {"share": (first + n * (sl.start or 0), n * step)}


class GrainIterator(grain.DatasetIterator[Arrays]):
    """The iterator of `GrainTokens`; its state is that of `TokenBatches`."""

    def __init__(self, batches: TokenBatches) -> None:
        super().__init__()
        self._batches = batches

    def __next__(self) -> Arrays:
        return next(self._batches).arrays()

    def get_state(self) -> dict[str, Any]:
        """See `TokenBatches.state_dict`."""
        return self._batches.state_dict()

    def set_state(self, state: dict[str, Any]) -> None:
        """See `TokenBatches.load_state_dict`."""
        self._batches.load_state_dict(state)
