"""What a shard holds and what a format must offer. One file a format; `core.formats.FORMATS` is the registry.

Axis letters: L layers, S samples, N tokens of all samples in a row, D width of the site.
"""

from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np
from jaxtyping import Int64, Shaped

from core.sinks import Sink
from core.windows import TokenizedSample

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

# Sample indices, and by layer the shape and dtype of each sample's activation.
Outline = tuple[tuple[int, ...], dict[int, list[tuple[tuple[int, ...], np.dtype]]]]


@dataclass(frozen=True)
class ShardContent:
    """The activations of one site for the samples of one window, ready to be written.

    Sample s owns tokens `offsets[s]` to `offsets[s + 1]` of every layer: its own tokens, never padding.
    """

    site: str
    layers: tuple[int, ...]
    activations: Shaped[np.ndarray, "L N D"]
    offsets: Int64[np.ndarray, "S+1"]
    samples: tuple[TokenizedSample, ...]

    def activation(self, layer_slot: int, sample: int) -> Shaped[np.ndarray, "T D"]:
        """A view of one sample's activations at the `layer_slot`-th stored layer."""
        return self.activations[layer_slot, self.offsets[sample] : self.offsets[sample + 1]]

    def outline(self) -> Outline:
        """What two runs of one window agree on, whatever their rounding."""
        shapes = [(self.activation(0, sample).shape, self.activations.dtype) for sample in range(len(self.samples))]
        return tuple(sample.sample_idx for sample in self.samples), dict.fromkeys(self.layers, shapes)


@dataclass(frozen=True)
class StoredShard:
    """A shard as read back: per layer the activations in the order of `sample_idx`."""

    sample_idx: tuple[int, ...]
    layers: dict[int, list[Shaped[np.ndarray, "T D"]]]

    def outline(self) -> Outline:
        """What two runs of one window agree on, whatever their rounding."""
        shapes = {layer: [(array.shape, array.dtype) for array in arrays] for layer, arrays in self.layers.items()}
        return self.sample_idx, shapes


class ShardFormat(Protocol):
    """One way to lay a shard out in a file. Same content, same bytes: no time stamps, no environment."""

    name: str
    compressible: bool

    def suffix(self) -> str:
        """The file name's ending without compression, such as `.pkl`."""
        ...

    def write(self, content: ShardContent, sink: Sink) -> None:
        """Writes `content`."""
        ...

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        ...


def stored_sample(content: ShardContent, layer_slot: int, sample: int) -> dict[str, Any]:
    """The dict of one sample as the default format stores it."""
    activation = content.activation(layer_slot, sample)
    return {
        "sample_idx": content.samples[sample].sample_idx,
        "activation": activation,
        "shape": activation.shape,
        "text_preview": content.samples[sample].text_preview,
    }
