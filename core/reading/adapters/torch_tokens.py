"""Batches of tokens as a torch dataset. Imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from core.base.dtypes import DTYPES
from core.reading.activations import Activations
from core.reading.token_batches import TokenBatch, TokenBatches

Tensors = dict[str, torch.Tensor]


class TorchTokens(IterableDataset[Tensors]):
    """Batches of tokens as dicts of tensors; ranks and DataLoader workers share the shards.

    Each token is in one batch of one worker of one rank an epoch. A rank's batches may be more than another's: to keep
    ranks together, train a number of steps with epochs=None.
    State is that of the iterator which began last in this process. torchdata's StatefulDataLoader saves it in each
    worker; a plain DataLoader does so without workers alone.
    """

    def __init__(
        self, acts: Activations, *, rank: int | None = None, world_size: int | None = None, **settings: Any
    ) -> None:
        acts.tokens(**settings)  # what does not fit is refused here, not in a worker
        self._acts, self._settings = acts, settings
        self._process = _process(rank, world_size)
        self._state: Mapping[str, Any] | None = None
        self._iterator: TensorBatches | None = None

    def __iter__(self) -> "TensorBatches":
        rank, world_size = self._process
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        batches = self._acts.tokens(share=(rank * workers + number, world_size * workers), **self._settings)
        if self._state is not None:
            batches.load_state_dict(self._state)
            self._state = None
        self._iterator = TensorBatches(batches)
        return self._iterator

    def state_dict(self) -> dict[str, Any]:
        """Where the iterator that began last is; empty before there is one."""
        return {} if self._iterator is None else self._iterator.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iterator continues after the batch after which `state` was taken."""
        self._state = state or None


class TensorBatches(Iterator[Tensors]):
    """The batches of a `TokenBatches` as tensors, with its state."""

    def __init__(self, batches: TokenBatches) -> None:
        self._batches = batches

    def __next__(self) -> Tensors:
        return tensors(next(self._batches))

    def state_dict(self) -> dict[str, Any]:
        """See `TokenBatches.state_dict`."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `TokenBatches.load_state_dict`."""
        self._batches.load_state_dict(state)


def tensors(batch: TokenBatch) -> Tensors:
    """The arrays of a batch as tensors of the same memory."""
    return {name: _tensor(array) for name, array in batch.arrays().items()}


def _tensor(array: np.ndarray) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype == DTYPES["bfloat16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.name == "float8_e4m3fn":
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)


def _process(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if rank is not None and world_size is not None:
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
