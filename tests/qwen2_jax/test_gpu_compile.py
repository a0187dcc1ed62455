"""The GPU's own compiler takes the attention kernel and the whole step; it runs on any Linux: `make test-gpu`."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from benchmarks.shapes import shape_of
from core.backend import StepRequest
from core.jax_utils import step_program
from qwen2_jax import Capture, Decoder
from qwen2_jax import attention as attention_module
from qwen2_jax.gpu_attention import triton_attention
from qwen2_jax.gpu_tiles import Tiles, candidates
from qwen2_jax.sharding import ModelMesh
from qwen2_jax.weights import cut_config

PLUGINS = "jax_cuda12_plugin", "jax_cuda13_plugin"
if not any(importlib.util.find_spec(name) for name in PLUGINS):
    pytest.skip("the GPU compiler is not installed: make test-gpu", allow_module_level=True)

# XLA's description of a device, as far as compiling asks for it. Sizes are those of NVIDIA's CUDA programming guide.
DEVICE = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared} shared_memory_per_core: {shared}
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536 core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 1000000000000 l2_cache_size: 40000000 clock_rate_ghz: 1.5 device_memory_size: 80000000000
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {name}"
"""
GPUS = {
    "H200": (9, 0, 232448, 132),
    "B200": (10, 0, 232448, 148),
    "A100": (8, 0, 166912, 108),
    "L4": (8, 9, 101376, 58),
}


def device(name, capability=None):
    major, minor, shared, cores = GPUS[name]
    major, minor = capability or (major, minor)
    config = DEVICE.format(name=name, major=major, minor=minor, shared=shared, cores=cores)
    return topologies.get_topology_desc(
        topology_name="", platform="cuda", topology="1x1x1", target_config=config
    ).devices[0]


def compile_kernel(on, head_dim, tiles: Tiles, softcap=None):
    mesh = Mesh(np.array([on]), "data")
    q, kv = ((2, 512, 2, *heads, head_dim) for heads in ((3,), ()))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, kv, kv)]
    first = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    kernel = partial(triton_attention, rotary=None, scale=0.1, softcap=softcap, tiles=tiles)
    whole = PartitionSpec()
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=(whole,) * 4, out_specs=whole, check_vma=False)
    return jax.jit(mapped).lower(*shapes, first).compile()


@pytest.mark.parametrize(("head_dim", "softcap"), [(64, None), (80, None), (128, None), (256, 50.0)])
def test_the_best_tiles_compile_for_hopper_and_the_smallest_for_all(head_dim, softcap):
    best, *_, small = candidates(head_dim)
    compile_kernel(device("H200"), head_dim, best, softcap)
    for name in GPUS:
        compile_kernel(device(name), head_dim, small, softcap)


def test_tiles_that_are_too_large_for_a_gpu_are_an_error_of_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compile_kernel(device("L4"), 256, candidates(256)[0])


def test_a_gpu_older_than_ampere_is_an_error_of_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError, match="only enabled for Ampere"):
        compile_kernel(device("L4", capability=(7, 5)), 64, candidates(64)[-1])


def step_memory(model, layers, *, rows, length):
    config, request = shape_of(model), StepRequest(Capture(layers), "bfloat16", "bfloat16")
    mesh = ModelMesh.of(config, [device("H200")], 1)
    cut = cut_config(config, layers[-1] + 1)
    abstract = Decoder.abstract(cut, jnp.bfloat16, mesh=mesh, with_final_norm=False, with_head=False)
    program = step_program(abstract, request, mesh)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=program.rows)
    return program.forward.lower(program.state, ids, ids, ids).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(("model", "layers"), [("Qwen2.5-0.5B", (0, 1)), ("gemma-2-2b", (2,))])
def test_a_step_on_an_h200_holds_no_logits(monkeypatch, model, layers):
    rows, length = 8, 2048
    dense = step_memory(model, layers, rows=rows, length=length)
    monkeypatch.setattr(attention_module, "_gpu_tiles", lambda q, softcap: candidates(q.shape[-1])[0])
    kernel = step_memory(model, layers, rows=rows, length=length)
    logits = 4 * rows * shape_of(model).n_heads * length**2
    assert logits <= dense
    assert kernel <= dense - logits / 2
