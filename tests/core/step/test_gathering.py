"""Taking tokens out of what a step gives, and bringing it to the host, for every kind of array alike."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core.step.backend import StepOutput
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host, wait_for
from qwen2_jax.sharding import DATA_AXIS

PLACES = np.array([[4, 0, 2], [1, 1, 5]], np.int32)


def on_jax(values: np.ndarray) -> jax.Array:
    mesh = Mesh(np.array(jax.local_devices()[:1]), (DATA_AXIS,))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec(None, DATA_AXIS)))


def on_torch(values: np.ndarray):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_models.step")
    return torch.from_numpy(values)


@pytest.fixture(params=[np.asarray, on_jax, on_torch], ids=["numpy", "jax", "torch"])
def output(request) -> StepOutput:
    """L, B, T, D are 3, 2, 6, 4."""
    x = np.random.default_rng(0).normal(size=(3, 2, 6, 4)).astype(np.float32)
    arrays, of_tokens = {"q": request.param(x), "residual": request.param(2 * x)}, request.param(np.abs(x).max(-1))
    return StepOutput(arrays, {"q": of_tokens}, {"residual": of_tokens})


def test_arrays_and_peaks_are_those_of_the_tokens_at_the_places(output):
    wait_for(output.peaks)
    whole, found = on_host(output), on_host(begin_copies(gather(output, PLACES)))
    for name, array in whole.arrays.items():
        for row, places in enumerate(PLACES):
            np.testing.assert_array_equal(found.arrays[name][:, row], array[:, row, places])
            np.testing.assert_array_equal(found.peaks["q"][:, row], whole.peaks["q"][:, row, places])
    assert found.arrays["q"].shape == (3, 2, 3, 4)
    assert found.norms == {}, "norms of tokens that are not there any more"


def test_what_is_on_its_way_already_is_not_begun_again(output):
    once = begin_copies(output)
    twice = begin_copies(once)
    assert all(twice.arrays[name] is array for name, array in once.arrays.items())


def test_without_places_nothing_is_copied_on_the_device(output):
    assert gather(output, None) is output
