"""Compressors without a file format around them, block by block as our formats use them."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import zstandard
from isal import igzip

from core.shards.formats.planes_shard import decode_block, encode_block, to_planes

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Codec:
    """`compress` takes a block (tokens, width); `decompress` returns its bytes, in any order."""

    compress: Callable[[np.ndarray], bytes]
    decompress: Callable[[bytes, np.ndarray], object]


def _huffman_only(block: np.ndarray) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, 31, 9, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(_bytes(block)) + compressor.flush()


def _zstd(level: int) -> Codec:
    return Codec(
        lambda block: zstandard.ZstdCompressor(level).compress(_bytes(block)),
        lambda data, block: zstandard.ZstdDecompressor().decompress(data),
    )


def _unzip(data: bytes, block: np.ndarray) -> bytes:
    return igzip.decompress(data)


CODECS = {
    "gzip 9": Codec(lambda block: gzip.compress(_bytes(block), 9, mtime=0), _unzip),
    "gzip 6": Codec(lambda block: gzip.compress(_bytes(block), 6, mtime=0), _unzip),
    "zlib, Huffman alone": Codec(_huffman_only, _unzip),
    "igzip 1": Codec(lambda block: igzip.compress(_bytes(block), 1, mtime=0), _unzip),
    "zstd 1": _zstd(1),
    "zstd 3": _zstd(3),
    "planes + zstd 1": Codec(
        encode_block, lambda data, block: decode_block(data, len(block), block.shape[1], block.dtype)
    ),
}


def blocks_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of tokens of every layer of (L, N, D)."""
    tokens = max(1, BLOCK_BYTES // (array.shape[2] * array.itemsize))
    return (layer[start : start + tokens] for layer in array for start in range(0, array.shape[1], tokens))


def entropy_ratio(array: np.ndarray) -> float:
    """The ratio of a perfect coder of single bytes: item size over the summed entropy of the byte planes.

    Computed for each layer separately. A coder that adapts within a layer may do better.
    """
    bits = [_entropy(plane) for layer in array for plane in to_planes(layer)]
    return 8 * array.itemsize * len(array) / sum(bits)


def _entropy(values: np.ndarray) -> float:
    shares = np.bincount(values, minlength=256) / len(values)
    return float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())


def _bytes(block: np.ndarray) -> memoryview:
    return np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
