"""The TPU's own compiler takes the attention of every kind of head; it runs on any Linux."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.pricing.hlo_cost import Program
from core.pricing.tpu_programs import tpu_devices
from qwen2_jax.attention import attention

pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install -e '.[lab]'")


def compiled_program(length, kv_heads, groups, head_dim, dtype=jnp.bfloat16, **settings):
    """Attention of two rows on one chip, rotated and with a traced window."""
    mesh = Mesh(tpu_devices("v5e:2x2")[:1], "data")

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct((2, *shape), dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def attend(q, k, v, segment_ids, cos, window):
        rotary = cos, cos
        return attention(q, k, v, segment_ids, scale=0.1, window=window[0], rotary=rotary, **settings)

    q, kv = array(length, kv_heads, groups, head_dim), array(length, kv_heads, head_dim)
    ids, table = array(length, dtype=jnp.int32), array(length, head_dim // 2, dtype=jnp.float32)
    return Program.parse(jax.jit(attend).lower(q, kv, kv, ids, table, array(dtype=jnp.int32)).compile().as_text())


@pytest.mark.parametrize(
    ("length", "kv_heads", "groups", "head_dim", "softcap"),
    [
        (512, 2, 7, 64, None),
        (640, 3, 1, 80, None),
        (128, 1, 4, 96, None),
        (1024, 5, 2, 128, 50.0),
        (256, 4, 2, 256, 50.0),
    ],
)
def test_every_head_becomes_the_kernel(length, kv_heads, groups, head_dim, softcap):
    program = compiled_program(length, kv_heads, groups, head_dim, softcap=softcap)
    assert sum(line.is_kernel for _, line in program.executed()) == 1


@pytest.mark.parametrize(("length", "dtype"), [(100, jnp.bfloat16), (128, jnp.float32)])
def test_other_row_lengths_and_float32_take_the_dense_path(length, dtype):
    program = compiled_program(length, 2, 2, 64, dtype=dtype)
    assert not any(line.is_kernel for _, line in program.executed())
