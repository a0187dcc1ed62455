"""safetensors: raw tensors after a JSON header, so one sample of one layer can be read without the rest.

Tensors: `layer_{i}` (N, D) in the stored dtype (bfloat16 exact), `token_ids` (N,) int32, `sample_idx` (S,) int64 and
`sample_offsets` (S+1,) int64: sample s owns rows offsets[s] to offsets[s+1]. Where tokens are left out, `positions`
(N,) int32 holds the places that the others had in their sample. Reduced activations have further tensors of the same
rows, `layer_{i}.indices` and `layer_{i}.scale`; where rows are pools there are neither `token_ids` nor `positions`.
Previews and labels stand in the sample table alone: the package opens no file whose header is above 100 MB.
The header is written here rather than by the safetensors package, whose writers copy every tensor first.
Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, header, tensors back to back).
"""

import itertools
import json
from concurrent.futures import Executor
from typing import BinaryIO

import numpy as np
from jaxtyping import Shaped

from core.base.safetensors_file import read_tensors, safetensors_header
from core.object_store.sinks import Sink
from core.reduce.reductions import array_name
from core.shards.formats.base import UNCOMPRESSED, ShardContent, StoredShard


class SafetensorsFormat:
    """See the module."""

    name = "safetensors"
    suffix = ".safetensors"
    dtypes = frozenset(UNCOMPRESSED)
    needs = None
    compressible = False
    expected_ratio = UNCOMPRESSED

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Streams header and tensors."""
        tensors: dict[str, np.ndarray] = {
            "sample_idx": np.array([sample.sample_idx for sample in content.samples], np.int64),
            "sample_offsets": content.offsets.astype(np.int64),
        }
        if content.token_ids is not None:
            tensors["token_ids"] = np.concatenate(content.token_ids).astype(np.int32)
        if content.positions is not None:
            tensors["positions"] = np.concatenate(content.positions)
        for slot, layer in enumerate(content.layers):
            tensors |= {array_name(f"layer_{layer}", name): array[slot] for name, array in content.arrays.items()}
        # Wider dtypes first, so that every tensor is aligned to its own.
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        sink.write(safetensors_header(tensors, _metadata(content)))
        for tensor in tensors.values():
            sink.write(np.ascontiguousarray(tensor).view(np.uint8).reshape(-1).data)

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file."""
        return values.nbytes

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        try:
            tensors = read_tensors(stream.read())
            offsets = tensors["sample_offsets"]
            sample_idx = tuple(int(index) for index in tensors["sample_idx"])
            by_sample = {
                name: [tensor[start:stop] for start, stop in itertools.pairwise(offsets)]
                for name, tensor in tensors.items()
                if name.startswith("layer_") or name in ("positions", "token_ids")
            }
            token_ids, positions = by_sample.pop("token_ids", None), by_sample.pop("positions", None)
            named: dict[str, dict[int, list[np.ndarray]]] = {"": {}}
            for tensor, arrays in by_sample.items():
                layer, _, name = tensor.removeprefix("layer_").partition(".")
                named.setdefault(name, {})[int(layer)] = arrays
        except (KeyError, TypeError, IndexError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a readable safetensors shard: {error!r}") from error
        more = {name: dict(sorted(layers.items())) for name, layers in sorted(named.items())}
        return StoredShard(sample_idx, more.pop(""), positions, token_ids, more)


def _metadata(content: ShardContent) -> dict[str, str]:
    return {
        "site": content.site,
        "layers": json.dumps(list(content.layers)),
    }
