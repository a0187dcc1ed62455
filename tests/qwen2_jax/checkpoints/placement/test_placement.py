"""Parameters arrive whole and where they belong, whatever the blocks they travel in."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from arrays_to_place import filled_by, parameter, values_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2_jax.checkpoints import placement
from qwen2_jax.checkpoints.placement import place
from qwen2_jax.checkpoints.weights import LayerTensor
from qwen2_jax.mapping.weight_table import Rows

DTYPES = st.sampled_from([np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)])
SIZES = st.integers(1, 9)


@pytest.mark.parametrize("kind", ["host", "device"])
@settings(deadline=None, max_examples=40)  # each new shape is compiled
@given(data=st.data(), dtype=DTYPES)
def test_any_parameter_in_any_blocks_is_itself(kind, data, dtype):
    stacked = data.draw(st.booleans())
    ndim = data.draw(st.integers(1, 2))
    shape = tuple(data.draw(st.tuples(*[SIZES] * (ndim + stacked))))
    transposed = ndim == 2 and data.draw(st.booleans())
    param = parameter(shape, stacked=stacked, transposed=transposed)
    with filled_by(kind, data.draw(st.integers(1, 400))):
        found = place({"p": param}, dtype)["p"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values_of(param).astype(dtype))


@given(st.tuples(SIZES, SIZES, SIZES), st.booleans(), st.integers(1, 3000))
def test_no_block_is_larger_than_it_may_be_unless_it_is_one_line(shape, transposed, limit):
    param = parameter(shape, stacked=True, transposed=transposed)
    layers, *sizes = placement._HostParamWriter(param, np.dtype(np.float32), limit)._block
    size = 4 * layers * np.prod(sizes)
    assert size <= limit or (layers == 1 and sizes[transposed] == 1)
    assert 2 * size > limit or (layers, *sizes) == shape or (layers == 1 and sizes[transposed] < shape[1 + transposed])


def test_several_parameters_keep_their_names(monkeypatch):
    params = {name: parameter((3, 5, 4), stacked=True, seed=seed) for seed, name in enumerate("abc")}
    found = place(params, np.dtype(np.float32))
    assert list(found) == ["a", "b", "c"]
    for name, param in params.items():
        np.testing.assert_array_equal(found[name], values_of(param))


def test_the_devices_own_buffer_is_written_in_place():
    """Donation holds on this platform: a parameter is not copied for each block."""
    write = placement._block_update(None)
    array = jnp.zeros((4, 64, 32))
    address = array.unsafe_buffer_pointer()
    for layer in range(4):
        array = write(array, jnp.ones((1, 64, 32)), np.array([layer, 0, 0], np.int32))
        assert array.unsafe_buffer_pointer() == address


def test_on_the_host_nothing_is_copied_for_the_device():
    param = parameter((2, 64, 32), stacked=True)
    writer = placement._HostParamWriter(param, np.dtype(np.float32), 1000)
    for start in writer.starts:
        writer.write(start, writer.read(start))
    (filled,) = writer._arrays.values()
    assert writer.result().unsafe_buffer_pointer() == filled.ctypes.data


def test_few_programs_write_all_blocks():
    """Blocks of one parameter have one shape, and equal parameters share their program."""
    params = {name: parameter((5, 37, 8), stacked=True) for name in "ab"}
    writer = placement._block_update(None)
    writer.clear_cache()
    with filled_by("device", 10 * 8 * 4):
        place(params, np.dtype(np.float32))
    assert writer._cache_size() == 1


class HalfOfTheMachines:
    """A sharding of four devices, of which this process has the first two."""

    def __init__(self, axis):
        self.axis = axis

    def addressable_devices_indices_map(self, shape):
        size = shape[self.axis] // 4
        full = [slice(None)] * len(shape)
        return {
            device: (*full[: self.axis], slice(device * size, (device + 1) * size), *full[self.axis + 1 :])
            for device in (0, 1)
        }


@pytest.mark.parametrize("transposed", [False, True])
def test_a_process_reads_no_more_rows_than_its_devices_hold(transposed):
    axis = 2 if transposed else 1
    param = parameter((3, 16, 16), stacked=True, transposed=transposed, sharding=HalfOfTheMachines(axis))
    writer = placement._HostParamWriter(param, np.dtype(np.float32), 16 * 4 * 2)
    for start in writer.starts:
        writer.write(start, writer.read(start))
    for layer in param.layers:
        times = layer.times_read().T if transposed else layer.times_read()
        assert (times[:8] == 1).all()
        assert (times[8:] == 0).all()


def test_every_device_of_a_mesh_gets_its_part():
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": f"{here}:{here.parents[3]}",
    }
    command = [sys.executable, str(here / "place_on_devices.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


class ArraySource:
    """A `WeightSource` of one tensor."""

    url = "memory"

    def __init__(self, array):
        self.array = array

    def names(self):
        return ["t"]

    def shape(self, name):
        return self.array.shape

    def read(self, name, start, stop):
        return self.array[start:stop]


@settings(deadline=None)
@given(st.data())
def test_rows_of_a_fused_tensor_are_those_of_each_group(data):
    groups, width, columns = (data.draw(st.integers(1, 5)) for _ in range(3))
    start = data.draw(st.integers(0, width - 1))
    stop = data.draw(st.integers(start + 1, width))
    fused = np.arange(groups * width * columns).reshape(groups * width, columns)
    expected = fused.reshape(groups, width, columns)[:, start:stop].reshape(-1, columns)
    first = data.draw(st.integers(0, len(expected)))
    last = data.draw(st.integers(first, len(expected)))
    rows = Rows(start, stop, groups)
    if first == last:
        return
    plain = LayerTensor(ArraySource(fused), "t", rows, transposed=False)
    np.testing.assert_array_equal(plain.read(slice(first, last), slice(0, columns)), expected[first:last])
    turned = LayerTensor(ArraySource(fused.T), "t", rows, transposed=True)
    np.testing.assert_array_equal(turned.read(slice(first, last), slice(0, columns)), expected[first:last])
    vector = LayerTensor(ArraySource(fused[:, 0]), "t", rows, transposed=False)
    np.testing.assert_array_equal(vector.read(slice(first, last), None), expected[first:last, 0])


def test_parameters_are_on_the_default_device_without_a_mesh():
    found = place({"p": parameter((4, 3), stacked=False)}, np.dtype(np.float32))["p"]
    assert found.devices() == {jax.devices()[0]}
    assert not found.committed
