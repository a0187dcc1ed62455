"""The content of a shard, and the protocol of a format; a file per format. The registry is `FORMATS`.

Axis letters: L layers, S samples, N stored rows of all samples, one after the other, K stored rows of one sample, W
values of a row. A row is a token, or one of the vectors that its tokens were pooled to.
"""

from collections.abc import Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, Protocol

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.object_store.sinks import Sink
from core.reduce.reductions import VALUES
from core.samples.windows import TokenizedSample

UNCOMPRESSED: Mapping[str, float] = MappingProxyType(dict.fromkeys(DTYPES | CODE_DTYPES, 1.0))
"""`ShardFormat.expected_ratio` of a format that stores values as they are."""


@dataclass(frozen=True)
class Outline:
    """The part of a window's file that is equal in all runs, whatever their rounding: samples, tokens and widths.

    Attributes:
      shapes: by name of an array and by layer, the shape and dtype of each sample's rows.
      positions: the places of each sample's stored tokens, where some are left out.
    """

    sample_idx: tuple[int, ...]
    shapes: dict[str, "Shapes"]
    positions: list[list[int]] | None


Shapes = dict[int, list[tuple[tuple[int, ...], np.dtype]]]


@dataclass(frozen=True)
class ShardContent:
    """The activations of one site for the samples of one window, ready to be written.

    Sample s owns rows `offsets[s]` to `offsets[s + 1]` of every layer: its own stored tokens, no padding, or its pools.
    N may be 0.

    Attributes:
      arrays: by the names of `core.reduce.reductions.Reduction.arrays`: VALUES, and further arrays of the same rows,
        such as the scales of quantized ones.
    """

    site: str
    layers: tuple[int, ...]
    arrays: Mapping[str, Shaped[np.ndarray, "L N _"]]
    offsets: Int64[np.ndarray, "S_plus_1"]
    samples: tuple[TokenizedSample, ...]

    @property
    def values(self) -> Shaped[np.ndarray, "L N W"]:
        """The activations, or their codes."""
        return self.arrays[VALUES]

    @property
    def more(self) -> dict[str, Shaped[np.ndarray, "L N _"]]:
        """The further arrays of the same rows."""
        return {name: array for name, array in self.arrays.items() if name != VALUES}

    def rows(self, name: str, layer_slot: int, sample: int) -> Shaped[np.ndarray, "K W"]:
        """A view of one sample's rows of an array at the `layer_slot`-th stored layer."""
        return self.arrays[name][layer_slot, self.offsets[sample] : self.offsets[sample + 1]]

    @property
    def is_pooled(self) -> bool:
        """Whether rows are no tokens."""
        return any(sample.n_pools for sample in self.samples)

    @property
    def token_ids(self) -> list[Int32[np.ndarray, "_"]] | None:
        """The ids of each sample's stored tokens; None where rows are pools."""
        if self.is_pooled:
            return None
        return [s.token_ids if s.reasons is None else s.token_ids[s.stored_places] for s in self.samples]

    @property
    def positions(self) -> list[Int32[np.ndarray, "_"]] | None:
        """The places of each sample's stored tokens; None where all tokens are stored, or rows are pools."""
        if self.is_pooled or any(sample.reasons is None for sample in self.samples):
            return None
        return [sample.stored_places.astype(np.int32) for sample in self.samples]

    def outline(self) -> Outline:
        """What any equivalent file of this window must match."""
        indices = tuple(sample.sample_idx for sample in self.samples)
        shapes = {name: self._shapes(name) for name in self.arrays}
        return Outline(indices, shapes, _plain(self.positions))

    def _shapes(self, name: str) -> Shapes:
        dtype = self.arrays[name].dtype
        shapes = [(self.rows(name, 0, sample).shape, dtype) for sample in range(len(self.samples))]
        return dict.fromkeys(self.layers, shapes)


@dataclass(frozen=True)
class StoredShard:
    """A shard as read back; every list is in the order of `sample_idx`.

    Attributes:
      layers: per layer the activations; more: per name and layer the further arrays of their rows.
      positions: the places of the stored tokens in their sample; None where all tokens are stored.
      token_ids: of the stored tokens, if the format stores them.
    """

    sample_idx: tuple[int, ...]
    layers: dict[int, list[Shaped[np.ndarray, "_ D"]]]
    positions: list[Int32[np.ndarray, "_"]] | None = None
    token_ids: list[Int32[np.ndarray, "_"]] | None = None
    more: dict[str, dict[int, list[Shaped[np.ndarray, "_ _"]]]] = field(default_factory=dict)

    def outline(self) -> Outline:
        """The outline of this file."""
        shapes = {name: _shapes(layers) for name, layers in ({VALUES: self.layers} | self.more).items()}
        return Outline(self.sample_idx, shapes, _plain(self.positions))


def _shapes(layers: Mapping[int, list[np.ndarray]]) -> Shapes:
    return {layer: [(array.shape, array.dtype) for array in arrays] for layer, arrays in layers.items()}


def _plain(positions: list[Int32[np.ndarray, "_"]] | None) -> list[list[int]] | None:
    return None if positions is None else [places.tolist() for places in positions]


class ShardFormat(Protocol):
    """A file format of shards. The same content gives the same bytes: no timestamps, nothing from the environment.

    Attributes:
      suffix: the file name's ending without compression, such as `.pkl`.
      compressible: whether gzip may be put around it; unless --no_compress_shards is given, it is.
      dtypes: names of the dtypes of values and codes that it can hold.
      needs: a package that is not installed with this project, without which it is neither written nor read.
      expected_ratio: by dtype, stored over raw bytes without gzip, before anything is measured.
    """

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    @property
    def compressible(self) -> bool: ...

    @property
    def dtypes(self) -> Collection[str]: ...

    @property
    def needs(self) -> str | None: ...

    @property
    def expected_ratio(self) -> Mapping[str, float]: ...

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Writes `content`; a format that compresses by itself does so in the threads of `executor`."""
        ...

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """The bytes of these values of one layer in a file, without headers."""
        ...

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; for damaged bytes raises ValueError, EOFError or OSError."""
        ...


def stored_sample(content: ShardContent, layer_slot: int, sample: int) -> dict[str, Any]:
    """The dict of one sample as the default format stores it.

    `token_positions` is there where tokens are left out, further arrays of its rows under their names.
    """
    activation = content.rows(VALUES, layer_slot, sample)
    described = content.samples[sample]
    fields = {
        "sample_idx": described.sample_idx,
        "activation": activation,
        "shape": activation.shape,
        "text_preview": described.text_preview,
    }
    fields |= {name: content.rows(name, layer_slot, sample) for name in content.more}
    if content.is_pooled or described.reasons is None:
        return fields
    return fields | {"token_positions": described.stored_places.astype(np.int32)}
