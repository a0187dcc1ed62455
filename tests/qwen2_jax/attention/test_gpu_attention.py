"""The GPU's attention kernel in interpret mode beside softmax in numpy float64, and where it is taken."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention_in_float64
from jax.sharding import AbstractDevice, AbstractMesh

from core.base.errors import ModelError
from qwen2_jax.attention import attention, dispatch, gpu_trial
from qwen2_jax.attention import gpu as gpu_attention
from qwen2_jax.attention.gpu import triton_attention
from qwen2_jax.attention.gpu_tiles import Tiles
from qwen2_jax.attention.logits import kv_start
from qwen2_jax.rope import rotate

SCALE = 0.37
KERNEL = "__gpu$xla.gpu.triton"
SMALL, LARGE = Tiles(64, 32, 4, 2), Tiles(128, 64, 4, 3)


@partial(jax.jit, static_argnames=("softcap", "tiles"))
def run(q, k, v, segment_ids, window=1 << 30, softcap=None, tiles=SMALL):
    start = kv_start(segment_ids, jnp.int32(window))
    return triton_attention(q, k, v, start, None, scale=SCALE, softcap=softcap, tiles=tiles, interpret=True)


def error_of(length, rows, *, kv_heads=2, groups=3, head_dim=64, dtype=jnp.float32, **settings):
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    segment_ids = np.stack([np.pad(row, (0, length - len(row))) for row in ids]).astype(np.int32)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(len(rows), length, kv_heads, groups, head_dim)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, len(rows), length, kv_heads, head_dim)), dtype)
    actual = np.asarray(run(q, k, v, segment_ids, **settings), np.float64)
    assert np.isfinite(actual).all()
    settings.pop("tiles", None)
    expected = attention_in_float64(q, k, v, segment_ids, scale=SCALE, **settings)
    return np.abs(actual - expected)[segment_ids > 0].max() / max(1, np.abs(expected).max())


@pytest.mark.parametrize(
    ("window", "softcap", "tiles"),
    [(1, None, SMALL), (100, 2.0, SMALL), (128, None, LARGE), (1 << 30, 2.0, LARGE), (1 << 30, None, SMALL)],
)
def test_packed_rows_windows_and_soft_caps_match_float64_attention(window, softcap, tiles):
    rows = [(384,), (127, 1, 130), (256, 128)]
    assert error_of(384, rows, groups=1, window=window, softcap=softcap, tiles=tiles) < 1e-5


@pytest.mark.parametrize("head_dim", [8, 80, 256])
def test_every_head_width_matches(head_dim):
    assert error_of(128, [(100, 28), (70,)], head_dim=head_dim) < 1e-5


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 8), (3, 2)])
def test_query_heads_meet_the_kv_head_of_their_group(kv_heads, groups):
    assert error_of(128, [(128,), (3, 90)], kv_heads=kv_heads, groups=groups) < 1e-5


def test_soft_capped_logits_of_any_size_stay_finite_and_exact():
    segment_ids = np.ones((1, 128), np.int32)
    rng = np.random.default_rng(0)
    q = 600 * rng.normal(size=(1, 128, 1, 1, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 128, 1, 64)).astype(np.float32)
    for cap in (None, 50.0):
        expected = attention_in_float64(q, k, v, segment_ids, scale=SCALE, softcap=cap)
        np.testing.assert_allclose(run(q, k, v, segment_ids, softcap=cap), expected, rtol=0, atol=1e-3)


def test_bfloat16_accumulates_in_float32():
    assert error_of(256, [(256,), (100, 156)], dtype=jnp.bfloat16) < 2**-7


def test_key_blocks_without_visible_keys_are_never_read():
    """A NaN in v reaches every query that multiplies it, even by a probability of zero."""
    segment_ids = np.repeat(np.array([[1, 2]], np.int32), 256, axis=1)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 512, 1, 2, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 512, 1, 64)).astype(np.float32)
    clean = run(q, k, v, segment_ids)
    other_sample, future = v.copy(), v.copy()
    other_sample[:, :256] = future[:, 320:] = np.nan
    np.testing.assert_array_equal(run(q, k, other_sample, segment_ids)[:, 256:], clean[:, 256:])
    np.testing.assert_array_equal(run(q, k, future, segment_ids)[:, :320], clean[:, :320])


def test_queries_and_keys_are_rotated_first():
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(1, 128, 1, 2, 64)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 1, 128, 1, 64)), jnp.float32)
    angles = rng.normal(size=(1, 128, 32)) * 100
    rotary = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    start = kv_start(jnp.ones((1, 128), jnp.int32))
    attend = partial(triton_attention, scale=SCALE, softcap=None, tiles=SMALL, interpret=True)
    expected = attend(rotate(q, rotary), rotate(k, rotary), v, start, None)
    np.testing.assert_allclose(attend(q, k, v, start, rotary), expected, rtol=0, atol=1e-6)


H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")


def lowered(platform, length=256, dtype=jnp.bfloat16, device=H200, **settings):
    """The program of `attention` for a platform that is not here, with a traced window and scale."""
    q, kv = (jax.ShapeDtypeStruct((2, length, 2, *heads, 64), dtype) for heads in ((3,), ()))
    ids, window = jax.ShapeDtypeStruct((2, length), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    scale = jax.ShapeDtypeStruct((), jnp.float32)

    def attend(q, k, v, segment_ids, window, scale):
        return attention(q, k, v, segment_ids, scale=scale, window=window, **settings)

    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        return jax.jit(attend).trace(q, kv, kv, ids, window, scale).lower(lowering_platforms=(platform,)).as_text()


@pytest.fixture
def with_gpu(monkeypatch):
    """As in a process whose GPU was found to run the kernel."""
    monkeypatch.setattr(dispatch, "_has_cuda", lambda: True)
    monkeypatch.setattr(gpu_trial, "usable_tiles", lambda head_dim, softcap: LARGE)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_the_platform_that_is_compiled_for_decides(with_gpu, softcap):
    assert KERNEL in lowered("cuda", softcap=softcap)
    assert KERNEL not in lowered("cpu", softcap=softcap)
    assert KERNEL not in lowered("rocm", softcap=softcap)


@pytest.mark.parametrize(("length", "dtype"), [(200, jnp.bfloat16), (256, jnp.float32)])
def test_other_row_lengths_and_float32_take_the_dense_path(with_gpu, length, dtype):
    assert KERNEL not in lowered("cuda", length=length, dtype=dtype)


def test_without_a_gpu_nothing_is_tried(monkeypatch):
    """Neither for a CPU, nor for a GPU that is compiled for without saying which."""
    monkeypatch.setattr(gpu_trial, "usable_tiles", pytest.fail)
    monkeypatch.setattr(dispatch, "candidates", pytest.fail)
    for device in (None, AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")):
        assert KERNEL not in lowered("cuda", device=device)


def test_a_gpu_that_is_not_here_but_compiled_for_takes_the_best_tiles(monkeypatch):
    monkeypatch.setattr(gpu_trial, "usable_tiles", pytest.fail)
    assert "num_warps = 4 : i32" in lowered("cuda").partition(KERNEL)[2]
    assert KERNEL not in lowered("cpu")


@pytest.fixture
def interpreted(monkeypatch):
    """Runs the probe of `usable_tiles` on this machine: what the kernel is replaced by, by its tiles."""
    faults = {}

    def kernel(*operands, tiles, **settings):
        out = triton_attention(*operands, tiles=tiles, interpret=True, **settings)
        return out if tiles not in faults else faults[tiles](out)

    monkeypatch.setattr(gpu_attention, "triton_attention", kernel)
    gpu_trial.usable_tiles.cache_clear()
    yield faults
    gpu_trial.usable_tiles.cache_clear()


def too_large(out):
    raise MemoryError("Shared memory size limit exceeded:\nrequested 148480, available: 101376")


@pytest.mark.parametrize("fault", [too_large, lambda out: out.at[0, 0].add(0.1)])
def test_tiles_that_fail_or_compute_something_else_are_passed_over(interpreted, fault, caplog):
    caplog.set_level("INFO")
    best, small = gpu_trial.candidates(64)
    interpreted[best] = fault
    for _ in range(2):
        assert gpu_trial.usable_tiles(64, None) == small
    (record,) = caplog.records
    said = (
        "attention: the kernel for GPUs, cut as Tiles(queries=64, keys=32, warps=4, stages=2); larger blocks do not run"
    )
    assert record.getMessage().startswith(said)


def while_compiling(reason):
    def fail(out):
        raise RuntimeError(reason)

    return fail


def while_running(reason):
    def fail(values):
        raise RuntimeError(reason)

    return lambda out: jax.pure_callback(fail, jax.ShapeDtypeStruct(out.shape, out.dtype), out)


@pytest.mark.parametrize("reason", ["Shared memory size limit exceeded: requested 9", "Register allocation failed"])
def test_what_the_compiler_finds_too_large_for_the_gpu_passes_tiles_over(interpreted, reason):
    best, small = gpu_trial.candidates(64)
    interpreted[best] = while_compiling(f"RESOURCE_EXHAUSTED: {reason}")
    assert gpu_trial.usable_tiles(64, None) == small


@pytest.mark.parametrize(
    "fault",
    [
        while_compiling("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8.00GiB"),
        while_compiling("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"),
        while_running("RESOURCE_EXHAUSTED: Failed to allocate request for 8.00GiB"),
    ],
)
def test_a_gpu_whose_memory_is_full_is_an_error_and_chooses_no_tiles(interpreted, fault):
    best = gpu_trial.candidates(64)[0]
    interpreted[best] = fault
    with pytest.raises(ModelError, match=r"^the GPU's memory is full before the first step; does something else run"):
        gpu_trial.usable_tiles(64, None)
    interpreted.clear()
    assert gpu_trial.usable_tiles(64, None) == best


def test_a_gpu_that_runs_none_of_them_is_told_in_one_line_and_takes_the_dense_path(interpreted, caplog, monkeypatch):
    interpreted.update(dict.fromkeys(gpu_trial.candidates(64), too_large))
    monkeypatch.setattr(dispatch, "_has_cuda", lambda: True)
    assert KERNEL not in lowered("cuda")
    (record,) = caplog.records
    assert record.getMessage() == (
        "attention: the kernel for GPUs cannot be used here, so a step holds all logits of its rows: "
        "MemoryError: Shared memory size limit exceeded: requested 148480, available: 101376"
    )


def test_a_jax_that_the_kernel_is_not_for_takes_the_dense_path(interpreted, caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_has_cuda", lambda: True)
    monkeypatch.delattr(gpu_attention, "triton_attention")
    assert KERNEL not in lowered("cuda")
    assert "cannot be used here" in caplog.text
    assert "ImportError" in caplog.text


def test_the_probe_computes_while_its_caller_is_being_traced(interpreted):
    found = []
    jax.jit(lambda x: found.append(gpu_trial.usable_tiles(256, 50.0)) or x)(jnp.zeros(()))
    assert found == [gpu_trial.candidates(256)[0]]


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; with one: JAX_PLATFORMS=cuda pytest -k real_gpu")
@pytest.mark.parametrize(
    ("head_dim", "softcap", "window"),
    [(64, None, 1 << 30), (80, 50.0, 100), (128, None, 100), (256, 50.0, 1 << 30)],
)
def test_a_real_gpu_takes_the_kernel_and_computes_what_float64_does(head_dim, softcap, window):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 1024, 2, 3, head_dim)), jnp.bfloat16)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 1024, 2, head_dim)), jnp.bfloat16)
    segment_ids = np.stack([np.repeat([1, 2, 3, 0], [300, 1, 700, 23]), np.ones(1024, int)]).astype(np.int32)
    attend = jax.jit(partial(attention, scale=head_dim**-0.5, softcap=softcap))
    program = attend.lower(q, k, v, segment_ids, window=jnp.int32(window))
    assert KERNEL in program.as_text()
    actual = np.asarray(program.compile()(q, k, v, segment_ids, window=jnp.int32(window)), np.float64)
    expected = attention_in_float64(q, k, v, segment_ids, scale=head_dim**-0.5, softcap=softcap, window=window)
    assert np.abs(actual - expected)[segment_ids > 0].max() < 2**-6
