"""Loads a model and prints what that took of the host's memory; run by `test_loading_memory`.

    measure_loading.py MODEL WEIGHTS_CACHE_DIR|- DTYPE HOW

HOW: host (the devices share the host's memory) or device (they are filled as an accelerator's are). The model is loaded
twice and the second time counts: by then everything is imported and compiled. Prints one JSON object, in bytes.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import jax
from flax import nnx

from qwen2_jax import load_config, load_model
from qwen2_jax.checkpoints import placement
from qwen2_jax.sharding import ModelMesh


def resident(key: str) -> int:
    """VmRSS: now. VmHWM: the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(path: str, cache: str, dtype: str, how: str) -> None:
    if how == "device":
        placement._param_writer = placement._DeviceParamWriter
    mesh = None
    if len(jax.devices()) > 1:
        mesh = ModelMesh.of(load_config(path), jax.devices(), model_parallel=len(jax.devices()) // 2)

    def load() -> list[jax.Array]:
        model = load_model(path, dtype=dtype, mesh=mesh, weights_cache_dir=None if cache == "-" else cache)
        return jax.block_until_ready(jax.tree.leaves(nnx.split(model)[1]))

    load()
    gc.collect()  # of the model, whose modules refer to each other
    before = resident("VmRSS")
    forget_peak()
    arrays = load()
    shards = [shard.data for array in arrays for shard in array.addressable_shards]
    held = {shard.unsafe_buffer_pointer(): shard.nbytes for shard in shards}
    print(json.dumps({"beyond": resident("VmHWM") - before - sum(held.values()), "held": sum(held.values())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
