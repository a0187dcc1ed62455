"""Shared by the peers: batches, activations without padding, shards of the default format."""

import gzip
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.peers.agreement import Shard, read_shards
from core.samples.windows import TokenizedSample

# Token ids and attention mask, both (B, T), to (B, T, D) for each captured layer.
Forward = Callable[[torch.Tensor, torch.Tensor], dict[int, torch.Tensor]]


@dataclass(frozen=True)
class Request:
    """What every side computes and writes.

    Attributes:
      model_folder: the model as a Hugging Face folder.
      dtype: stored dtype; shard_bytes: bytes of arrays after which a shard ends.
    """

    model_path: str
    model_folder: Path
    samples: tuple[TokenizedSample, ...]
    layers: tuple[int, ...]
    d_model: int
    dtype: np.dtype
    batch_size: int
    shard_bytes: int


class PeerSide(Protocol):
    """A loaded peer."""

    @property
    def computed_tokens(self) -> int:
        """Tokens computed, padding included."""
        ...

    def run(self, folder: Path) -> None:
        """Computes and stores all activations in `folder`, which does not exist yet."""
        ...

    def shards(self, folder: Path) -> Iterator[Shard]:
        """The stored shards."""
        ...


@dataclass(frozen=True)
class BatchedSide:
    """A peer that computes one batch after another and stores them with `gzip.open` and `pickle.dump`."""

    forward: Forward
    request: Request
    samples: Sequence[TokenizedSample]

    @property
    def computed_tokens(self) -> int:
        """Tokens, padded to the longest of each batch."""
        return sum(len(batch) * longest(batch) for batch in batches(self.samples, self.request.batch_size))

    def run(self, folder: Path) -> None:
        """Writes shard_0001.pkl.gz and so on."""
        folder.mkdir(parents=True)
        shard: Shard = {layer: [] for layer in self.request.layers}
        n_bytes = n_shards = n_done = 0
        for batch in batches(self.samples, self.request.batch_size):
            n_bytes += self._extend(shard, batch)
            n_done += len(batch)
            if n_bytes >= self.request.shard_bytes or n_done == len(self.samples):
                n_shards += 1
                with gzip.open(folder / f"shard_{n_shards:04d}.pkl.gz", "wb") as file:
                    pickle.dump(shard, file)
                shard, n_bytes = {layer: [] for layer in self.request.layers}, 0

    def shards(self, folder: Path) -> Iterator[Shard]:
        """The stored shards."""
        return read_shards(folder)

    def _extend(self, shard: Shard, batch: Sequence[TokenizedSample]) -> int:
        """Adds a batch; returns the bytes of its arrays."""
        with torch.no_grad():
            hidden = self.forward(*padded(batch))
        n_bytes = 0
        for layer in self.request.layers:
            for row, sample in enumerate(batch):
                # A copy, because a view would keep every padded batch in memory.
                kept = hidden[layer][row, : len(sample.token_ids)].float().numpy()
                shard[layer].append(stored_item(sample, kept.astype(self.request.dtype)))
                n_bytes += shard[layer][-1]["activation"].nbytes
        return n_bytes


def stored_item(sample: TokenizedSample, activation: np.ndarray) -> dict[str, Any]:
    """A sample as the default format stores it."""
    return {
        "sample_idx": sample.sample_idx,
        "activation": activation,
        "shape": activation.shape,
        "text_preview": sample.text_preview,
    }


def by_length(samples: Sequence[TokenizedSample]) -> list[TokenizedSample]:
    """The samples sorted by length, so that a batch has little padding."""
    return sorted(samples, key=lambda sample: len(sample.token_ids))


def batches(samples: Sequence[TokenizedSample], size: int) -> Iterator[Sequence[TokenizedSample]]:
    """Runs of `size` samples."""
    return (samples[start : start + size] for start in range(0, len(samples), size))


def longest(samples: Sequence[TokenizedSample]) -> int:
    """Tokens of the longest sample."""
    return max(len(sample.token_ids) for sample in samples)


def padded(batch: Sequence[TokenizedSample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (B, T), padded on the right."""
    tokens, mask = (torch.zeros(len(batch), longest(batch), dtype=torch.long) for _ in range(2))
    for row, sample in enumerate(batch):
        tokens[row, : len(sample.token_ids)] = torch.as_tensor(sample.token_ids)
        mask[row, : len(sample.token_ids)] = 1
    return tokens, mask
