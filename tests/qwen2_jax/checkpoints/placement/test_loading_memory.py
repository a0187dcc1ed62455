"""Loading takes the memory of what the devices hold, and beyond it less than 1.3 of the largest tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from qwen2_jax.checkpoints.loading import convert_weights

LARGEST = 32 << 20
CONFIG = {
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 8192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
MATRICES = {
    "self_attn.q_proj": (1024, 1024),
    "self_attn.k_proj": (1024, 1024),
    "self_attn.v_proj": (1024, 1024),
    "self_attn.o_proj": (1024, 1024),
    "mlp.gate_proj": (8192, 1024),
    "mlp.up_proj": (8192, 1024),
    "mlp.down_proj": (1024, 8192),
}
pytestmark = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc to measure a peak"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Eight tensors of 32 MiB, and smaller ones, in four files."""
    folder = tmp_path_factory.mktemp("model")
    values = np.random.default_rng(0).standard_normal(LARGEST // 4, np.float32)
    files = [{"model.embed_tokens.weight": (8192, 1024), "model.norm.weight": (1024,)}]
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norms = {prefix + f"{name}_layernorm.weight": (1024,) for name in ("input", "post_attention")}
        files.append({prefix + f"{name}.weight": shape for name, shape in MATRICES.items()} | norms)
    files.append({"lm_head.weight": (8192, 1024)})
    index = {}
    for number, shapes in enumerate(files):
        name = f"model-{number}.safetensors"
        save_file({tensor: values[: np.prod(shape)].reshape(shape) for tensor, shape in shapes.items()}, folder / name)
        index |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def measure(model, *, devices=1, dtype="float32", how="host", cache="-"):
    here = Path(__file__).parent
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{here.parents[3]}",
    }
    command = [sys.executable, str(here / "measure_loading.py"), str(model), str(cache), dtype, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# Every pair of values of two of them, in four of the eight combinations.
@pytest.mark.parametrize(
    ("devices", "how", "dtype"),
    [(1, "host", "float32"), (1, "device", "bfloat16"), (4, "host", "bfloat16"), (4, "device", "float32")],
)
def test_a_checkpoint_of_several_files_is_read_straight_into_the_devices(devices, how, dtype, model):
    found = measure(model, devices=devices, dtype=dtype, how=how)
    assert found["held"] > 5 * LARGEST * np.dtype(dtype if dtype == "float32" else ml_dtypes.bfloat16).itemsize / 4
    assert found["beyond"] <= 1.3 * LARGEST


def test_so_are_cached_weights(model, tmp_path):
    convert_weights(str(model), str(tmp_path), dtype="float32")
    assert measure(model, cache=tmp_path)["beyond"] <= 1.3 * LARGEST
