"""The TPU's attention in interpret mode beside softmax in numpy float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_oracle import attention_in_float64

from qwen2_jax.attention.logits import kv_start
from qwen2_jax.attention.tpu import splash_attention
from qwen2_jax.rope import rotate

SCALE = 0.37


@partial(jax.jit, static_argnames="softcap")
def run(q, k, v, segment_ids, window, softcap):
    start = kv_start(segment_ids, window)
    return splash_attention(q, k, v, start, None, scale=SCALE, softcap=softcap, interpret=True)


def error_of(length, rows, *, kv_heads=2, groups=3, head_dim=64, window=1 << 30, softcap=None, dtype=jnp.float32):
    ids = [np.repeat(np.arange(1, len(row) + 1), row) for row in rows]
    segment_ids = np.stack([np.pad(row, (0, length - len(row))) for row in ids]).astype(np.int32)
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(len(rows), length, kv_heads, groups, head_dim)), dtype)
    k, v = jnp.asarray(rng.normal(size=(2, len(rows), length, kv_heads, head_dim)), dtype)
    actual = np.asarray(run(q, k, v, segment_ids, jnp.int32(window), softcap), np.float64)
    assert np.isfinite(actual).all()
    expected = attention_in_float64(q, k, v, segment_ids, scale=SCALE, window=window, softcap=softcap)
    return np.abs(actual - expected)[segment_ids > 0].max() / max(1, np.abs(expected).max())


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [1, 100, 128, 200, 1 << 30])
def test_packed_rows_windows_and_soft_caps_match_float64_attention(window, softcap):
    assert error_of(384, [(384,), (127, 1, 130), (256, 128)], window=window, softcap=softcap) < 1e-5


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_every_head_width_matches(head_dim):
    assert error_of(128, [(100, 28), (70,)], head_dim=head_dim) < 1e-5


@pytest.mark.parametrize(("kv_heads", "groups"), [(1, 8), (3, 1), (2, 7)])
def test_query_heads_meet_the_kv_head_of_their_group(kv_heads, groups):
    assert error_of(128, [(128,), (3, 90)], kv_heads=kv_heads, groups=groups) < 1e-5


def test_blocks_that_do_not_divide_a_row_are_not_taken():
    assert error_of(640, [(600, 40), (128, 512)], window=300) < 1e-5


def test_bfloat16_accumulates_in_float32():
    assert error_of(256, [(256,), (100, 156)], dtype=jnp.bfloat16) < 2**-7


@pytest.mark.parametrize(("head_dim", "n_pairs"), [(64, 32), (80, 10), (128, 64)])
def test_rotation_in_the_kernels_layout_is_that_of_every_other_path(head_dim, n_pairs):
    """Partly rotated heads too; compared with attention to what `rope.rotate` gives."""
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.normal(size=(2, 128, 2, 3, head_dim)), jnp.float32)
    k, v = jnp.asarray(rng.normal(size=(2, 2, 128, 2, head_dim)), jnp.float32)
    angles = rng.normal(size=(2, 128, n_pairs)) * 100
    rotary = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    start = kv_start(jnp.ones((2, 128), jnp.int32))
    attend = partial(splash_attention, scale=SCALE, softcap=None, interpret=True)
    expected = attend(rotate(q, rotary), rotate(k, rotary), v, start, None)
    np.testing.assert_allclose(attend(q, k, v, start, rotary), expected, rtol=0, atol=1e-5)


def test_key_blocks_without_visible_keys_are_never_read():
    """A NaN in v reaches every query that multiplies it, even by a probability of zero."""
    segment_ids = np.repeat(np.array([[1, 2]], np.int32), 512, axis=1)
    rng = np.random.default_rng(0)
    q = rng.normal(size=(1, 1024, 1, 2, 64)).astype(np.float32)
    k, v = rng.normal(size=(2, 1, 1024, 1, 64)).astype(np.float32)
    spoiled = v.copy()
    spoiled[:, :512] = np.nan
    arguments = segment_ids, jnp.int32(1 << 30), None
    np.testing.assert_array_equal(run(q, k, spoiled, *arguments)[:, 512:], run(q, k, v, *arguments)[:, 512:])
