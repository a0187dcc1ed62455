"""The GPU's own compiler takes the attention kernel and the whole step; it runs on any Linux: `make test-gpu`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from benchmarks.common.shapes import Case
from benchmarks.gpu.compilation import GPUS, Gpu, gpu_device, has_compiler, step_memory
from qwen2_jax.attention import dispatch
from qwen2_jax.attention.gpu import triton_attention
from qwen2_jax.attention.gpu_tiles import Tiles, candidates

if not has_compiler():
    pytest.skip("the GPU compiler is not installed: make test-gpu", allow_module_level=True)


def compile_kernel(name, head_dim, tiles: Tiles, softcap=None):
    mesh = Mesh(np.array([gpu_device(name)]), "data")
    q, kv = ((2, 512, 2, *heads, head_dim) for heads in ((3,), ()))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, kv, kv)]
    first = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    kernel = partial(triton_attention, rotary=None, scale=0.1, softcap=softcap, tiles=tiles)
    whole = PartitionSpec()
    mapped = jax.shard_map(kernel, mesh=mesh, in_specs=(whole,) * 4, out_specs=whole, check_vma=False)
    return jax.jit(mapped).lower(*shapes, first).compile()


@pytest.mark.parametrize(("head_dim", "softcap"), [(64, None), (80, None), (128, None), (256, 50.0)])
def test_the_best_tiles_compile_for_hopper_and_the_smallest_from_ampere_on(head_dim, softcap):
    best, *_, small = candidates(head_dim)
    compile_kernel("H200", head_dim, best, softcap)
    for name in ("H200", "B200", "A100", "L4"):
        compile_kernel(name, head_dim, small, softcap)


def test_tiles_that_are_too_large_for_a_gpu_are_an_error_of_the_compiler():
    with pytest.raises(jax.errors.JaxRuntimeError, match="Shared memory size limit exceeded"):
        compile_kernel("L4", 256, candidates(256)[0])


def test_a_gpu_older_than_ampere_is_an_error_of_the_compiler(monkeypatch):
    monkeypatch.setitem(GPUS, "L4", Gpu(7, 5, 65536, 40))
    with pytest.raises(jax.errors.JaxRuntimeError, match="only enabled for Ampere"):
        compile_kernel("L4", 64, candidates(64)[-1])


@pytest.mark.parametrize(("model", "layers"), [("Qwen2.5-0.5B", (0, 1)), ("gemma-2-2b", (2,))])
def test_a_step_on_an_h200_holds_no_logits(monkeypatch, model, layers):
    case = Case(model, layers, 2048)
    kernel = step_memory(case, "H200", 16384)
    monkeypatch.setattr(dispatch, "kernel_tiles", lambda q, softcap: None)
    dense = step_memory(case, "H200", 16384)
    assert dense.temporary >= dense.logits
    assert kernel.temporary <= dense.temporary - kernel.logits / 2
