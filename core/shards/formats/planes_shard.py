"""planes: a zip of zstd frames, each a block of one layer whose bytes are sorted by their place in the value.

The bytes of an activation are not alike: the one with the exponent takes few values and compresses, those of the
mantissa are noise. So the first bytes of all values of a block stand together, then the second ones, and so on: planes.

Members, none compressed by zip itself: `shard.json` (`Header`); `sample_idx.npy` (S,) int64, `sample_offsets.npy`
(S+1,) int64, `token_ids.npy` (N,) int32, and where tokens are left out `positions.npy` (N,) int32; then
`layer_{i}/{block:06d}.zst`, tokens block × block_tokens to (block + 1) × block_tokens of a layer. Reduced activations
have `layer_{i}/indices.npy` and `layer_{i}/scale.npy` besides; where rows are pools there are no token ids. A zip has
its table of contents at the end, so it is written in one go, and `numpy.load` opens it and reads a block without the
rest.
Formats: PKWARE's APPNOTE.TXT, RFC 8878, `numpy.lib.format`.
"""

import json
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from functools import partial
from types import MappingProxyType
from typing import BinaryIO, TypeVar

import numpy as np
import zstandard
from jaxtyping import Shaped, UInt8

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.base.json_types import Kinds, require_all, require_types
from core.object_store.sinks import Sink
from core.shards.formats.base import ShardContent, StoredShard
from core.shards.formats.stored_zip import (
    DAMAGED_ZIP,
    add_array,
    add_member,
    cut_by_sample,
    member_bytes,
    new_archive,
    open_archive,
    parse_npy,
)

# Prompts that begin alike have the same activations there: a block holds several, and zstd looks back that far.
BLOCK_BYTES = 4 << 20
_ZSTD = zstandard.ZstdCompressionParameters.from_level(1, window_log=22)
# Blocks that are being compressed or are queued.
_IN_FLIGHT = 8
_HEADER_FILE = "shard.json"
_HEADER: Kinds = {
    "site": (str,),
    "layers": (list,),
    "dtype": (str,),
    "tokens": (int,),
    "width": (int,),
    "block_tokens": (int,),
}
_ARRAYS = {"sample_idx": np.int64, "sample_offsets": np.int64, "token_ids": np.int32, "positions": np.int32}

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Header:
    """The description of a file's blocks: each layer is (tokens, width) of `dtype`, cut every `block_tokens` tokens."""

    site: str
    layers: tuple[int, ...]
    dtype: str
    tokens: int
    width: int
    block_tokens: int
    more: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: ShardContent) -> "Header":
        """The header of a new file."""
        _, tokens, width = content.values.shape
        dtype = content.values.dtype
        return cls(
            site=content.site,
            layers=content.layers,
            dtype=dtype.name,
            tokens=tokens,
            width=width,
            block_tokens=max(1, BLOCK_BYTES // (width * dtype.itemsize)),
            more=tuple(content.more),
        )

    def to_json(self) -> bytes:
        """`more` where there is any."""
        fields = asdict(self)
        if not self.more:
            del fields["more"]
        return json.dumps(fields, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Header":
        """Raises ValueError if `data` is not a header."""
        fields = json.loads(data)
        require_types(fields, _HEADER)
        require_all(fields["layers"], int, "layers")
        require_all(fields.get("more", []), str, "more")
        header = cls(**fields | {"layers": tuple(fields["layers"]), "more": tuple(fields.get("more", ()))})
        if header.dtype not in DTYPES | CODE_DTYPES or header.tokens < 0 or header.width < 1 or header.block_tokens < 1:
            raise ValueError(f"{_HEADER_FILE} describes what cannot be: {header}")
        return header

    def blocks(self) -> list[tuple[int, int]]:
        """The first token of each block of a layer, and the one past its last."""
        starts = range(0, self.tokens, self.block_tokens)
        return [(start, min(start + self.block_tokens, self.tokens)) for start in starts]


class PlanesFormat:
    """See the module."""

    name = "planes"
    suffix = ".planes"
    dtypes = frozenset(DTYPES | CODE_DTYPES)
    needs = None
    compressible = False
    # Of prompts that have nothing in common.
    expected_ratio: Mapping[str, float] = MappingProxyType(
        {"float16": 0.87, "bfloat16": 0.69, "float32": 0.85, "int8": 0.9, "float8_e4m3fn": 0.85}
    )

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Streams the members; blocks are compressed by `executor`, at most a few at a time."""
        header = Header.of(content)
        with new_archive(sink) as archive:
            add_member(archive, _HEADER_FILE, header.to_json())
            for name, array in _index_of(content).items():
                add_array(archive, name, array)
            names = (_block_name(layer, block) for layer in header.layers for block in range(len(header.blocks())))
            blocks = (layer[start:stop] for layer in content.values for start, stop in header.blocks())
            for name, frame in zip(names, _in_order(encode_block, blocks, executor), strict=True):
                add_member(archive, name, frame)
            for array_name, array in content.more.items():
                for layer, values in zip(header.layers, array, strict=True):
                    add_array(archive, _more_name(layer, array_name), values)

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file."""
        return len(encode_block(values))

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        try:
            with open_archive(stream) as archive:
                return _read_archive(archive)
        except DAMAGED_ZIP as error:
            raise ValueError(f"not a readable planes shard: {error!r}") from error


def to_planes(values: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "W n"]:
    """Plane i has byte i of every value, from the least significant one; W is the item size."""
    words = np.ascontiguousarray(values).reshape(-1).view(f"<u{values.itemsize}")
    planes = np.empty((values.itemsize, len(words)), np.uint8)
    for place, plane in enumerate(planes):
        # Shifts run on whole registers; a strided copy of bytes is several times slower.
        np.right_shift(words, 8 * place, out=plane, casting="unsafe")
    return planes


def from_planes(planes: UInt8[np.ndarray, "W n"], dtype: np.dtype) -> Shaped[np.ndarray, "n"]:
    """The values that `to_planes` took apart."""
    words = planes[-1].astype(f"<u{dtype.itemsize}")
    for plane in planes[-2::-1]:
        words <<= 8
        words |= plane
    return words.view(dtype)


def encode_block(block: Shaped[np.ndarray, "n D"]) -> bytes:
    """One zstd frame with the planes of a block."""
    return zstandard.ZstdCompressor(compression_params=_ZSTD).compress(to_planes(block).data)


def decode_block(frame: bytes | memoryview, tokens: int, width: int, dtype: np.dtype) -> Shaped[np.ndarray, "n D"]:
    """The block in a frame. Raises ValueError when it holds another number of bytes."""
    # The size that a frame announces is allocated before anything is read of it.
    if zstandard.frame_content_size(frame) != tokens * width * dtype.itemsize:
        raise ValueError(f"a block is not that of {tokens} tokens of {width} values")
    planes = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    return from_planes(planes.reshape(dtype.itemsize, -1), dtype).reshape(tokens, width)


def _index_of(content: ShardContent) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {
        "sample_idx": np.array([sample.sample_idx for sample in content.samples], np.int64),
        "sample_offsets": content.offsets.astype(np.int64),
    }
    if content.token_ids is not None:
        arrays["token_ids"] = np.concatenate(content.token_ids).astype(np.int32)
    return arrays if content.positions is None else arrays | {"positions": np.concatenate(content.positions)}


def _block_name(layer: int, block: int) -> str:
    return f"layer_{layer}/{block:06d}.zst"


def _more_name(layer: int, array: str) -> str:
    return f"layer_{layer}/{array}"


def _in_order(make: Callable[[Item], Made], items: Iterable[Item], executor: Executor | None) -> Iterator[Made]:
    """What `make` makes of each item, in their order, some of them made ahead by `executor`."""
    if executor is None:
        yield from map(make, items)
        return
    pending: deque[Future[Made]] = deque()
    for item in items:
        pending.append(executor.submit(make, item))
        if len(pending) > _IN_FLIGHT:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _read_archive(archive: zipfile.ZipFile) -> StoredShard:
    header = Header.from_json(member_bytes(archive, _HEADER_FILE))
    arrays = {name: _array(archive, name) for name in _ARRAYS if f"{name}.npy" in archive.namelist()}
    if "token_ids" in arrays and len(arrays["token_ids"]) != header.tokens:
        raise ValueError(f"it has {len(arrays['token_ids'])} token ids for {header.tokens} tokens")
    _check_members(archive, header, arrays)
    offsets = arrays["sample_offsets"]
    by_sample = partial(cut_by_sample, offsets, header.tokens)
    layers = {layer: by_sample(_read_layer(archive, header, layer)) for layer in header.layers}
    positions = by_sample(arrays["positions"]) if "positions" in arrays else None
    sample_idx = tuple(arrays["sample_idx"].tolist())
    if len(sample_idx) != len(offsets) - 1:
        raise ValueError(f"it has {len(sample_idx)} sample numbers and {len(offsets) - 1} samples")
    token_ids = by_sample(arrays["token_ids"]) if "token_ids" in arrays else None
    more = {
        name: {layer: by_sample(_read_more(archive, header, layer, name)) for layer in header.layers}
        for name in header.more
    }
    return StoredShard(sample_idx, layers, positions, token_ids, more)


def _read_more(archive: zipfile.ZipFile, header: Header, layer: int, name: str) -> Shaped[np.ndarray, "N W"]:
    member = f"{_more_name(layer, name)}.npy"
    array = parse_npy(member_bytes(archive, member))
    if array.ndim != 2 or len(array) != header.tokens:
        raise ValueError(f"{member} has shape {array.shape} for {header.tokens} rows")
    return array


def _check_members(archive: zipfile.ZipFile, header: Header, arrays: dict[str, np.ndarray]) -> None:
    expected = [_HEADER_FILE, *(f"{name}.npy" for name in arrays)]
    expected += [_block_name(layer, block) for layer in header.layers for block in range(len(header.blocks()))]
    expected += [f"{_more_name(layer, name)}.npy" for layer in header.layers for name in header.more]
    if sorted(expected) != sorted(archive.namelist()):
        raise ValueError(f"its members are not those that {_HEADER_FILE} describes")


def _read_layer(archive: zipfile.ZipFile, header: Header, layer: int) -> Shaped[np.ndarray, "N D"]:
    dtype = (DTYPES | CODE_DTYPES)[header.dtype]
    blocks = [
        decode_block(member_bytes(archive, _block_name(layer, block)), stop - start, header.width, dtype)
        for block, (start, stop) in enumerate(header.blocks())
    ]
    return np.concatenate(blocks) if blocks else np.empty((0, header.width), dtype)


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    array = parse_npy(member_bytes(archive, f"{name}.npy"))
    if array.dtype != _ARRAYS[name] or array.ndim != 1:
        raise ValueError(f"{name}.npy is {array.dtype} of shape {array.shape}")
    return array
