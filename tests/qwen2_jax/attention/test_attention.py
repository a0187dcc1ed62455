import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention_in_float64
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.attention import attention
from qwen2_jax.attention.dense import dense_attention
from qwen2_jax.attention.logits import kv_start

SCALE = 0.37
oracle = partial(attention_in_float64, scale=SCALE)
KV_HEADS, GROUPS, HEAD_DIM = 2, 3, 8


def random_qkv(rows, length, groups=GROUPS, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, length, KV_HEADS, groups, HEAD_DIM))
    k, v = rng.normal(size=(2, rows, length, KV_HEADS, HEAD_DIM))
    return tuple(x.astype(np.float32) for x in (q, k, v))


def segments(*rows, length):
    """One row of ids for each tuple of sample lengths; what is left over is padding."""
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    return np.stack([np.pad(row, (0, length - len(row))) for row in ids]).astype(np.int32)


@partial(jax.jit, static_argnames=("implementation", "softcap"))
def run(q, k, v, segment_ids, window=None, implementation="dispatched", softcap=None):
    if implementation == "dense":
        return dense_attention(q, k, v, kv_start(segment_ids, window), None, scale=SCALE, softcap=softcap)
    return attention(q, k, v, segment_ids, scale=SCALE, window=window, softcap=softcap)


def assert_close(actual, expected, segment_ids, tolerance):
    actual = np.asarray(actual, np.float64)
    assert np.isfinite(actual).all()
    real = segment_ids > 0
    error = np.abs(actual - expected)[real].max(initial=0)
    assert error <= tolerance * np.abs(expected).max(initial=1)


@pytest.mark.parametrize("implementation", ["dispatched", "dense"])
def test_soft_cap_bends_the_logits_before_the_mask(implementation):
    segment_ids = segments((200, 56), (256,), length=256)
    q, k, v = random_qkv(2, 256)
    capped = run(q * 4, k, v, segment_ids, window=31, softcap=2.0, implementation=implementation)
    assert_close(capped, oracle(q * 4, k, v, segment_ids, window=31, softcap=2.0), segment_ids, 1e-6)


@pytest.mark.parametrize("implementation", ["dispatched", "dense"])
@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize(
    ("length", "rows"),
    [
        (1, [(1,)]),
        (7, [(3, 1, 1), (7,)]),
        (128, [(128,), ()]),
        (256, [(127, 2, 127), (128, 128), (1,) * 200]),
        (300, [(299, 1), (100, 57), (130, 140)]),
        (640, [(640,), (255, 2, 300), (600,)]),
    ],
)
def test_matches_float64_attention(length, rows, groups, implementation):
    segment_ids = segments(*rows, length=length)
    q, k, v = random_qkv(len(rows), length, groups)
    assert_close(
        run(q, k, v, segment_ids, implementation=implementation), oracle(q, k, v, segment_ids), segment_ids, 1e-6
    )


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 300), max_size=12), min_size=2, max_size=2),
    window=st.sampled_from([1, 2, 63, 127, 128, 129, 200, 256, 10_000]),
    seed=st.integers(0, 99),
)
def test_any_packing_and_window_matches_float64_attention(rows, window, seed):
    length = 400
    fitting = [[n for i, n in enumerate(row) if sum(row[: i + 1]) <= length] for row in rows]
    segment_ids = segments(*fitting, length=length)
    q, k, v = random_qkv(len(rows), length, seed=seed)
    actual = run(q, k, v, segment_ids, jnp.int32(window))
    assert_close(actual, oracle(q, k, v, segment_ids, window=window), segment_ids, 1e-6)


@pytest.mark.parametrize("implementation", ["dispatched", "dense"])
def test_logits_of_any_size_stay_exact(implementation):
    segment_ids = segments((200, 184), length=384)
    q, k, v = random_qkv(1, 384)
    actual = run(600 * q, k, v, segment_ids, implementation=implementation)
    assert_close(actual, oracle(600 * q, k, v, segment_ids), segment_ids, 1e-3)


@pytest.mark.parametrize("implementation", ["dispatched", "dense"])
def test_bfloat16_accumulates_in_float32(implementation):
    segment_ids = segments((500, 140), length=640)
    q, k, v = random_qkv(1, 640)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (3 * q, k, v))
    actual = run(q, k, v, segment_ids, implementation=implementation)
    assert actual.dtype == jnp.bfloat16
    # Probabilities and the result are each rounded to 8 bits; rounding logits, which reach 20, would cost far more.
    assert_close(actual, oracle(q, k, v, segment_ids), segment_ids, 2**-7)


def test_packed_samples_equal_the_same_samples_alone():
    lengths, row_length = (170, 1, 129, 84), 384
    segment_ids = segments(lengths, length=row_length)
    q, k, v = random_qkv(1, row_length)
    packed = run(q, k, v, segment_ids)
    ends = np.cumsum(lengths)
    for begin, end in zip(ends - lengths, ends, strict=True):
        alone = run(*(x[:, begin:end] for x in (q, k, v)), np.ones((1, end - begin), np.int32))
        np.testing.assert_allclose(packed[:, begin:end], alone, rtol=0, atol=1e-6 * np.abs(alone).max())


def test_key_blocks_without_visible_keys_are_never_read():
    """A NaN in v reaches every query that multiplies it, even by a probability of zero."""
    segment_ids = segments((512, 512), length=1024)
    q, k, v = random_qkv(1, 1024)
    clean = run(q, k, v, segment_ids)
    other_sample, future = v.copy(), v.copy()
    other_sample[:, :512] = np.nan
    future[:, 768:] = np.nan
    np.testing.assert_array_equal(run(q, k, other_sample, segment_ids)[:, 512:], clean[:, 512:])
    np.testing.assert_array_equal(run(q, k, future, segment_ids)[:, :768], clean[:, :768])
    windowed = run(q, k, v, segment_ids, jnp.int32(128))
    far = v.copy()
    far[:, 512:640] = np.nan
    np.testing.assert_array_equal(run(q, k, far, segment_ids, jnp.int32(128))[:, 768:], windowed[:, 768:])


def test_one_compiled_scan_serves_layers_with_and_without_a_window():
    segment_ids = segments((150, 100), length=256)
    q, k, v = random_qkv(1, 256)
    windows = jnp.array([1 << 30, 17, 130], jnp.int32)

    @jax.jit
    def layers(x):
        return jax.lax.scan(lambda x, window: (run(x, k, v, segment_ids, window),) * 2, x, windows)[1]

    expected = q
    for actual, window in zip(layers(q), windows, strict=True):
        expected = oracle(expected, k, v, segment_ids, window=int(window))
        expected[segment_ids == 0] = 0
        assert_close(actual, expected, segment_ids, 1e-5)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from qwen2_jax.attention import attention

B, T, K, G, H = 8, 384, 2, 2, 16
rng = np.random.default_rng(0)
q, k, v = (rng.normal(size=s).astype(np.float32) for s in ((B, T, K, G, H), (B, T, K, H), (B, T, K, H)))
ids = np.stack([np.repeat([1, 2, 0], [n, 200, 184 - n]) for n in rng.integers(1, 184, B)]).astype(np.int32)

def layers(attend):
    def forward(q, k, v, ids):
        windows = jnp.array([50, 1000], jnp.int32)
        return jax.lax.scan(lambda x, window: (attend(x, k, v, ids, window), None), q, windows)[0]
    return jax.jit(forward)

def attend(q, k, v, ids, window):
    return attention(q, k, v, ids, scale=0.3, window=window)

mesh = jax.make_mesh((4, 2), ("data", "model"))
heads, tokens = P("data", None, "model"), P("data")
specs = dict(mesh=mesh, in_specs=(heads, heads, heads, tokens, P()), out_specs=heads)
args = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((q, heads), (k, heads), (v, heads), (ids, tokens))]
compiled = layers(jax.shard_map(attend, **specs)).lower(*args).compile()
text = compiled.as_text()
for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
    assert collective not in text, collective
actual = compiled(*args)
assert len(actual.sharding.device_set) == 8
np.testing.assert_allclose(actual, layers(attend)(q, k, v, ids), rtol=0, atol=1e-6)
"""


def test_sharded_over_rows_and_heads_equals_one_device_without_communication():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command, root = [sys.executable, "-c", SHARDED], Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
