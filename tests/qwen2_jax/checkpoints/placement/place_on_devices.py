"""Places parameters on a mesh of eight CPU devices; run by `test_placement` in a process of its own.

Prints nothing and exits with 0 when every device got its part, from parts that were read once.
"""

import itertools
import sys

import jax
import numpy as np
from arrays_to_place import filled_by, parameter, values_of
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qwen2_jax.checkpoints.placement import place

CASES = [
    ((3, 16, 24), P(None, "model", None)),
    ((3, 16, 24), P(None, None, "model")),
    ((4, 16, 24), P("data", None, "model")),
    ((4, 16, 24), P(None, "model", "data")),
    ((4, 16, 24), P()),
    ((3, 16), P(None, "model")),
    ((32, 8), P("model", None)),
    ((32, 8), P(None, "model")),
    ((32, 8), P(("data", "model"), None)),
    ((16,), P("model")),
]


def check(kind: str, mesh: Mesh, shape: tuple[int, ...], spec: P, transposed: bool, block_bytes: int) -> None:
    stacked = len(shape) == 3 or shape == (3, 16)
    if len(shape) - stacked == 1 and transposed:
        return
    param = parameter(shape, stacked=stacked, transposed=transposed, sharding=NamedSharding(mesh, spec))
    with filled_by(kind, block_bytes):
        found = place({"p": param}, np.dtype(np.float32))["p"]
    assert found.sharding == param.sharding
    assert found.shape == shape
    for shard in found.addressable_shards:
        np.testing.assert_array_equal(shard.data, values_of(param)[shard.index])
    for layer in param.layers:
        # The last block of a parameter begins early where the others do not end with it.
        assert layer.times_read().min() >= 1
        assert layer.times_read().mean() <= 2
        if block_bytes > 10_000:
            assert layer.times_read().max() == 1


def main() -> int:
    assert len(jax.devices()) == 8
    for kind, (data, model) in itertools.product(("host", "device"), ((2, 4), (4, 2))):
        mesh = Mesh(np.array(jax.devices()).reshape(data, model), ("data", "model"))
        for (shape, spec), transposed, block in itertools.product(CASES, (False, True), (300, 100_000)):
            check(kind, mesh, shape, spec, transposed, block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
