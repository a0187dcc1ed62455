"""Batches of tokens on the devices of a mesh, one ahead of the one that is used. Imports jax.

Axis letters: B rows of a batch, L layers that were asked for, D values of a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Shaped

from core.base.errors import UsageError
from core.reading.token_batches import TokenBatch, TokenBatches


@dataclass(frozen=True)
class DeviceBatch:
    """A batch whose activations are on devices: of all processes together where there are several.

    `host` is this process's own batch, with the numbers that say which token each row is.
    """

    activations: Shaped[Array, "B *layers D"]
    host: TokenBatch


class DeviceBatches(Iterator[DeviceBatch]):
    """Places the batches of an iterator by a sharding of their rows. One batch is copied while the one before is used.

    In a program of several processes each passes its own share of the tokens (`share=(jax.process_index(),
    jax.process_count())`), and a batch has the rows of all. `state_dict` is that of the batch returned last.
    Raises UsageError for a batch whose rows the sharding does not divide: use drop_last=True.
    """

    def __init__(self, batches: TokenBatches, sharding: jax.sharding.NamedSharding) -> None:
        self._batches, self._sharding = batches, sharding
        self._state = batches.state_dict()
        self._ahead: tuple[DeviceBatch, dict[str, Any]] | None = None

    def __next__(self) -> DeviceBatch:
        found = self._ahead or self._place_next()
        if found is None:
            raise StopIteration
        # The copy of the next batch runs while the caller works on this one.
        self._ahead = self._place_next()
        batch, self._state = found
        return batch

    def state_dict(self) -> dict[str, Any]:
        """See `TokenBatches.state_dict`."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `TokenBatches.load_state_dict`."""
        self._batches.load_state_dict(state)
        self._ahead, self._state = None, dict(state)

    def _place_next(self) -> tuple[DeviceBatch, dict[str, Any]] | None:
        batch = next(self._batches, None)
        if batch is None:
            return None
        try:
            placed = jax.make_array_from_process_local_data(self._sharding, np.ascontiguousarray(batch.activations))
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UsageError(
                f"a batch of {len(batch)} rows cannot be placed: {reason}; choose a batch_size that the mesh divides, "
                "and drop_last=True"
            ) from error
        return DeviceBatch(placed, batch), self._batches.state_dict()
