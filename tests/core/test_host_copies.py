"""The way to the host that GPUs take, on CPU devices, which have pinned memory too: the same bytes arrive."""

import subprocess
import sys

import jax.numpy as jnp
import pytest
from tiny_run import cache_dir, committed_files, environment, token_lines, write_jsonl, write_model

from core import host_copies
from core.host_copies import begin_copies
from core.run_config import RunConfig
from core.runner import run

SPLIT = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from core import host_copies

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
values = np.arange(2 * 4 * 3 * 8, dtype=np.float16).reshape(2, 4, 3, 8)
specs = {"whole": PartitionSpec(), "rows": PartitionSpec(None, "data"), "both": PartitionSpec("model", "data")}
arrays = {name: jax.device_put(values, NamedSharding(mesh, spec)) for name, spec in specs.items()}
host_copies._is_pinned_for = lambda array: True
copied = host_copies.begin_copies(arrays)
for name, array in copied.items():
    assert array.sharding == arrays[name].sharding.with_memory_kind("pinned_host"), (name, array.sharding)
    np.testing.assert_array_equal(np.asarray(array), values)
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
    monkeypatch.setattr(host_copies, "_is_pinned_for", lambda array: taken.append(array) or True)
    assert stored(tmp_path, "pinned", **flags) == plain
    assert taken


def test_arrays_that_are_split_over_devices_keep_their_places(tmp_path):
    env = environment(XLA_FLAGS="--xla_force_host_platform_device_count=4")
    done = subprocess.run([sys.executable, "-c", SPLIT], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_devices_that_are_no_gpus_copy_as_before():
    arrays = {"residual": jnp.ones((2, 3)), "mlp": jnp.zeros(4)}
    assert begin_copies(arrays) is arrays
    assert begin_copies({}) == {}
