"""The default format: a pickle of {layer: [{sample_idx, activation, shape, text_preview}, …]}.

Where tokens are left out, `token_positions` (int32) says which places of the sample the others had. Reduced activations
have further arrays, `indices` and `scale`.
Readable with `pickle` and numpy alone (bfloat16 and fp8 need ml_dtypes too). Our own reader admits arrays and plain
containers only: a pickle from elsewhere cannot run code here.
"""

import copyreg
import importlib
import pickle
from concurrent.futures import Executor
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Shaped

from core.object_store.sinks import Sink
from core.shards.formats.base import UNCOMPRESSED, ShardContent, StoredShard, stored_sample

# numpy 1 and 2 write different module names for the same two functions.
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("ml_dtypes", "bfloat16"),
    ("ml_dtypes", "float8_e4m3fn"),
}
_MORE = ("indices", "scale")
# Protocol 5 pickles of numpy 2 name a module that numpy 1.26 does not have; 4 is read by both.
PROTOCOL = 4


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles arrays and plain containers; anything else raises UnpicklingError naming it."""

    def find_class(self, module: str, name: str) -> Any:
        """The object a pickle names, when it is on the list."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is neither an array nor a plain container")
        return getattr(importlib.import_module(module), name)


class PickleFormat:
    """See the module."""

    name = "pickle"
    suffix = ".pkl"
    dtypes = frozenset(UNCOMPRESSED)
    needs = None
    compressible = True
    expected_ratio = UNCOMPRESSED

    def write(self, content: ShardContent, sink: Sink, executor: Executor | None = None) -> None:
        """Streams the pickle: at most one array is copied at a time."""
        shard = {
            layer: [stored_sample(content, slot, sample) for sample in range(len(content.samples))]
            for slot, layer in enumerate(content.layers)
        }
        pickler = pickle.Pickler(sink, protocol=PROTOCOL)
        # The memo would keep a copy of every array until the end, and make the bytes depend on object identities.
        pickler.fast = True
        pickler.dump(shard)

    def stored_bytes(self, values: Shaped[np.ndarray, "..."]) -> int:
        """What these values of one layer take in a file."""
        return values.nbytes

    def read(self, stream: BinaryIO) -> StoredShard:
        """Reads a whole shard; raises ValueError saying what is wrong with the bytes."""
        # Extension codes are cached, and a cached one bypasses the allow-list.
        copyreg.clear_extension_cache()
        try:
            shard = RestrictedUnpickler(stream).load()
            layers = {layer: [item["activation"] for item in items] for layer, items in shard.items()}
            orders = {tuple(item["sample_idx"] for item in items) for items in shard.values()}
            shapes_agree = all(item["shape"] == item["activation"].shape for items in shard.values() for item in items)
            positions = [_positions(items) for items in shard.values()]
            more = {
                name: {layer: [item[name] for item in items] for layer, items in shard.items()}
                for name in _MORE
                if any(name in item for items in shard.values() for item in items)
            }
            for arrays in (layers, *more.values()):
                _require_arrays(arrays)
        except (pickle.UnpicklingError, EOFError, OSError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a readable pickle shard: {error}") from error
        if len(orders) != 1 or not shapes_agree:
            raise ValueError("its layers hold different samples, or a shape that is not its array's")
        if any(not _equal(positions[0], other) for other in positions):
            raise ValueError("its layers hold different tokens")
        return StoredShard(orders.pop(), layers, positions[0], more=more)


def _require_arrays(layers: dict[int, list[Any]]) -> None:
    if not all(isinstance(array, np.ndarray) for arrays in layers.values() for array in arrays):
        raise TypeError("something else stands where an array belongs")


def _positions(items: list[dict[str, Any]]) -> list[np.ndarray] | None:
    if not any("token_positions" in item for item in items):
        return None
    return [np.asarray(item["token_positions"]) for item in items]


def _equal(one: list[np.ndarray] | None, other: list[np.ndarray] | None) -> bool:
    if one is None or other is None:
        return one is other
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
