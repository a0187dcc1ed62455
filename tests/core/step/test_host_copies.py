"""The way to the host that GPUs take, on CPU devices, which have pinned memory too: the same bytes arrive."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import cache_dir, committed_files, environment, token_lines, write_jsonl, write_model

from core.run.config import RunConfig
from core.run.runner import run
from core.step import host_copies
from core.step.backend import StepOutput
from core.step.gathering import take_tokens
from core.step.host_copies import begin_copies, begin_copy

SPLIT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from core.step import host_copies
from core.step.backend import StepOutput

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
values = np.arange(2 * 4 * 3 * 8, dtype=np.float16).reshape(2, 4, 3, 8)
specs = {"whole": PartitionSpec(), "rows": PartitionSpec(None, "data"), "both": PartitionSpec("model", "data")}
arrays = {name: jax.device_put(values, NamedSharding(mesh, spec)) for name, spec in specs.items()}
host_copies._writes_pinned_memory = lambda device: True
copied = host_copies.begin_copies(StepOutput(arrays, {})).arrays
for name, array in copied.items():
    np.testing.assert_array_equal(np.asarray(array), values)
assert copied["both"].sharding == arrays["both"].sharding.with_memory_kind("pinned_host"), copied["both"].sharding
assert copied["whole"] is arrays["whole"]
assert copied["rows"] is arrays["rows"]
"""


def stored(home, name, **flags):
    config = RunConfig(
        model_path=str(home / "model"),
        dataset_path=str(home / "s.jsonl"),
        output_dir=str(home / name),
        checkpoint_dir=str(home / name / "ck"),
        compilation_cache_dir=cache_dir(),
        max_seq_length=256,
        layers_to_extract=(0, 2),
        shard_size_gb=1e-4,
        **flags,
    )
    run(config)
    return committed_files(home / name)


@pytest.mark.parametrize("flags", [{}, {"quantize": "int8", "format": "safetensors"}], ids=["whole", "reduced"])
def test_a_run_stores_the_same_bytes_through_pinned_memory(tmp_path, monkeypatch, flags):
    write_model(tmp_path / "model")
    write_jsonl(tmp_path / "s.jsonl", token_lines(12, seed=5))
    plain = stored(tmp_path, "plain", **flags)
    taken = []
    monkeypatch.setattr(host_copies, "_writes_pinned_memory", lambda device: taken.append(device) or True)
    assert stored(tmp_path, "pinned", **flags) == plain
    assert taken


def test_an_array_whose_parts_lie_on_one_device_each_takes_pinned_memory_and_a_repeated_one_is_copied_once(tmp_path):
    env = environment(XLA_FLAGS="--xla_force_host_platform_device_count=4")
    done = subprocess.run([sys.executable, "-c", SPLIT], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("platform", "kinds", "taken"),
    [
        ("gpu", ("device", "pinned_host"), True),
        ("gpu", ("device",), False),
        ("cpu", ("device", "pinned_host"), False),
        ("tpu", ("device", "pinned_host"), False),
    ],
)
def test_gpus_with_pinned_memory_are_told_from_other_devices(platform, kinds, taken):
    """CUDA's devices name themselves "gpu"."""
    memories = [SimpleNamespace(kind=kind) for kind in kinds]
    device = SimpleNamespace(platform=platform, addressable_memories=lambda: memories)
    assert host_copies._writes_pinned_memory(device) is taken


def test_devices_that_are_no_gpus_copy_as_before():
    arrays = {"residual": jnp.ones((2, 3)), "mlp": jnp.zeros(4)}
    copied = begin_copies(StepOutput(arrays, peaks=arrays))
    for name, array in arrays.items():
        assert copied.arrays[name] is copied.peaks[name] is array


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no GPU; with one: JAX_PLATFORMS=cuda pytest -k real_gpu")
def test_a_real_gpu_copies_the_same_bytes_to_pinned_memory():
    values = np.random.default_rng(0).integers(0, 1 << 16, (2, 3, 1000), np.uint16).view(jnp.bfloat16)
    copied = begin_copy(jnp.asarray(values))
    assert copied.sharding.memory_kind == "pinned_host"
    np.testing.assert_array_equal(np.asarray(copied).view(np.uint16), values.view(np.uint16))


def test_what_is_no_known_array_is_refused_by_its_type():
    for function, arguments in ((begin_copy, ()), (take_tokens, (np.zeros((1, 1), np.int32),))):
        with pytest.raises(TypeError, match="list"):
            function([1.0], *arguments)
