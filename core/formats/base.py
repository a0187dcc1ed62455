"""What a shard holds and what a format must offer. One file a format; `core.formats.FORMATS` is the registry.

Axis letters: L layers, S samples, N stored tokens of all samples in a row, K stored tokens of one sample, D width of
the site.
"""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Int32, Int64, Shaped

from core.sinks import Sink
from core.windows import TokenizedSample

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}


UNCOMPRESSED: Mapping[str, float] = MappingProxyType(dict.fromkeys(DTYPES, 1.0))
"""`ShardFormat.usual_share` of a format that keeps values as they are."""


@dataclass(frozen=True)
class Outline:
    """What two runs of one window agree on, whatever their rounding: which samples, which of their tokens, how wide.

    Attributes:
      shapes: by layer, the shape and dtype of each sample's activation.
      positions: the places of each sample's stored tokens, where some are left out.
    """

    sample_idx: tuple[int, ...]
    shapes: dict[int, list[tuple[tuple[int, ...], np.dtype]]]
    positions: list[list[int]] | None


@dataclass(frozen=True)
class ShardContent:
    """The activations of one site for the samples of one window, ready to be written.

    Sample s owns tokens `offsets[s]` to `offsets[s + 1]` of every layer: those of its own that are stored, never
    padding. N may be 0.
    """

    site: str
    layers: tuple[int, ...]
    activations: Shaped[np.ndarray, "L N D"]
    offsets: Int64[np.ndarray, "S+1"]
    samples: tuple[TokenizedSample, ...]

    def activation(self, layer_slot: int, sample: int) -> Shaped[np.ndarray, "K D"]:
        """A view of one sample's activations at the `layer_slot`-th stored layer."""
        return self.activations[layer_slot, self.offsets[sample] : self.offsets[sample + 1]]

    @property
    def token_ids(self) -> list[Int32[np.ndarray, "K"]]:
        """The ids of each sample's stored tokens."""
        return [s.token_ids if s.reasons is None else s.token_ids[s.kept] for s in self.samples]

    @property
    def positions(self) -> list[Int32[np.ndarray, "K"]] | None:
        """The places of each sample's stored tokens; None where all tokens are stored."""
        if any(sample.reasons is None for sample in self.samples):
            return None
        return [sample.kept.astype(np.int32) for sample in self.samples]

    def outline(self) -> Outline:
        """What a file of another run of this window has to hold too."""
        shapes = [(self.activation(0, sample).shape, self.activations.dtype) for sample in range(len(self.samples))]
        indices = tuple(sample.sample_idx for sample in self.samples)
        return Outline(indices, dict.fromkeys(self.layers, shapes), _plain(self.positions))


@dataclass(frozen=True)
class StoredShard:
    """A shard as read back; every list is in the order of `sample_idx`.

    Attributes:
      layers: per layer the activations.
      positions: the places of the stored tokens in their sample; None where all tokens are stored.
      token_ids: of the stored tokens, where the format keeps them.
    """

    sample_idx: tuple[int, ...]
    layers: dict[int, list[Shaped[np.ndarray, "K D"]]]
    positions: list[Int32[np.ndarray, "K"]] | None = None
    token_ids: list[Int32[np.ndarray, "K"]] | None = None

    def outline(self) -> Outline:
        """What this file holds, whatever its rounding."""
        shapes = {layer: [(array.shape, array.dtype) for array in arrays] for layer, arrays in self.layers.items()}
        return Outline(self.sample_idx, shapes, _plain(self.positions))


def _plain(positions: list[Int32[np.ndarray, "K"]] | None) -> list[list[int]] | None:
    return None if positions is None else [places.tolist() for places in positions]


class ShardFormat(Protocol):
    """One way to lay a shard out in a file. Same content, same bytes: no time stamps, no environment.

    Attributes:
      compressible: whether gzip may be put around it.
      usual_share: by dtype, stored over raw bytes without gzip, before anything is measured.
    """

    @property
    def name(self) -> str: ...

    @property
    def compressible(self) -> bool: ...

    @property
    def usual_share(self) -> Mapping[str, float]: ...

    def suffix(self) -> str:
        """The file name's ending without compression, such as `.pkl`."""
        ...

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Writes `content`; a format that compresses by itself does so in the threads of `executor`."""
        ...

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file, all else left out."""
        ...

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        ...


def stored_sample(content: ShardContent, layer_slot: int, sample: int) -> dict[str, Any]:
    """The dict of one sample as the default format stores it; `token_positions` is there where tokens are left out."""
    activation = content.activation(layer_slot, sample)
    described = content.samples[sample]
    fields = {
        "sample_idx": described.sample_idx,
        "activation": activation,
        "shape": activation.shape,
        "text_preview": described.text_preview,
    }
    return fields if described.reasons is None else fields | {"token_positions": described.kept.astype(np.int32)}
