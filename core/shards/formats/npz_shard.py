"""npz: what `numpy.load` opens by itself, one array after the other, not compressed.

Members: `layer_{i}.npy` (N, D) in the stored dtype, `token_ids.npy` (N,) int32, `sample_idx.npy` (S,) int64 and
`sample_offsets.npy` (S+1,) int64: sample s owns rows offsets[s] to offsets[s+1]. Where tokens are left out,
`positions.npy` (N,) int32 holds the places that the others had in their sample. Reduced activations have
`layer_{i}.indices.npy` and `layer_{i}.scale.npy` besides; where rows are pools there are no token ids.
The format has neither bfloat16 nor float8: numpy would read them as bytes without a meaning.
"""

import re
import zipfile
from concurrent.futures import Executor
from functools import partial
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

from core.base.dtypes import CODE_DTYPES, DTYPES
from core.object_store.sinks import Sink
from core.reduce.reductions import array_name
from core.shards.formats.base import UNCOMPRESSED, ShardContent, StoredShard
from core.shards.formats.stored_zip import (
    DAMAGED_ZIP,
    add_array,
    cut_by_sample,
    member_bytes,
    new_archive,
    open_archive,
    parse_npy,
)

LAYER_NAME = re.compile(r"layer_(-?[0-9]{1,6})(?:\.(indices|scale))?")
INDEX_DTYPES = {"sample_idx": np.int64, "sample_offsets": np.int64, "token_ids": np.int32, "positions": np.int32}


class NpzFormat:
    """See the module."""

    name = "npz"
    suffix = ".npz"
    dtypes = frozenset(DTYPES | CODE_DTYPES) - {"bfloat16", "float8_e4m3fn"}
    needs = None
    compressible = False
    expected_ratio = UNCOMPRESSED

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Streams the members, without a copy of the values. Raises ValueError for a dtype that numpy alone lacks."""
        if content.values.dtype.name not in self.dtypes:
            raise ValueError(f"npz has no {content.values.dtype}")
        with new_archive(sink) as archive:
            add_array(archive, "sample_idx", np.array([sample.sample_idx for sample in content.samples], np.int64))
            add_array(archive, "sample_offsets", content.offsets.astype(np.int64))
            if content.token_ids is not None:
                add_array(archive, "token_ids", np.concatenate(content.token_ids).astype(np.int32))
            if content.positions is not None:
                add_array(archive, "positions", np.concatenate(content.positions))
            for slot, layer in enumerate(content.layers):
                for name, array in content.arrays.items():
                    add_array(archive, array_name(f"layer_{layer}", name), array[slot])

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file."""
        return values.nbytes

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        try:
            with open_archive(stream) as archive:
                return _read_archive(archive)
        except DAMAGED_ZIP as error:
            raise ValueError(f"not a readable npz shard: {error!r}") from error


def _read_archive(archive: zipfile.ZipFile) -> StoredShard:
    index: dict[str, np.ndarray] = {}
    named: dict[str, dict[int, np.ndarray]] = {"": {}}
    for member in archive.namelist():
        name, array = member.removesuffix(".npy"), parse_npy(member_bytes(archive, member))
        match = LAYER_NAME.fullmatch(name)
        if match is not None and array.ndim == 2:
            named.setdefault(match[2] or "", {})[int(match[1])] = array
        elif array.ndim == 1 and array.dtype == INDEX_DTYPES.get(name):
            index[name] = array
        else:
            raise ValueError(f"{member} is {array.dtype} of shape {array.shape}")
    return _shard(index, named)


def _shard(index: dict[str, np.ndarray], named: dict[str, dict[int, np.ndarray]]) -> StoredShard:
    sample_idx, offsets = tuple(index["sample_idx"].tolist()), index["sample_offsets"]
    if len(sample_idx) != len(offsets) - 1:
        raise ValueError(f"it has {len(sample_idx)} sample numbers and {len(offsets) - 1} samples")
    by_sample = partial(cut_by_sample, offsets, int(offsets[-1]))
    rows = {name: by_sample(index[name]) for name in ("positions", "token_ids") if name in index}
    more = {
        name: {layer: by_sample(array) for layer, array in layers.items()} for name, layers in sorted(named.items())
    }
    if any(layers.keys() != more[""].keys() for layers in more.values()):
        raise ValueError("its layers have different arrays")
    return StoredShard(sample_idx, more.pop(""), rows.get("positions"), rows.get("token_ids"), more)
