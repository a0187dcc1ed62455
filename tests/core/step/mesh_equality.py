"""Run by test_mesh.py with 8 CPU devices: every family split over the model axes of a mesh equals one device."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from core.jax_utils import ExtractionStep
from core.step.backend import StepRequest
from core.step.device_mesh import device_share
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host
from core.step.layout import StepArrays
from qwen2_jax import Capture, Decoder
from qwen2_jax.families import FAMILIES, decoder_config
from qwen2_jax.parameters import parameter_specs
from qwen2_jax.sharding import ModelMesh

# Widths that some of the splits divide and some do not.
SIZES = {"vocab_size": 100, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128}


def heads(kind, n_heads, n_kv_heads, **settings):
    """A config with that many heads of 8."""
    sizes = {"hidden_size": 8 * n_heads, "num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads}
    return kind(**SIZES | sizes | settings)


CASES = {
    "qwen2": heads(Qwen2Config, 14, 2),
    "qwen3": heads(Qwen3Config, 8, 2, head_dim=12),
    "llama": heads(LlamaConfig, 6, 3, attention_bias=True, mlp_bias=True),
    "mistral": heads(MistralConfig, 8, 8, sliding_window=5),
    "gemma": heads(GemmaConfig, 8, 1, head_dim=8),
    "gemma2": heads(Gemma2Config, 8, 4, head_dim=12, sliding_window=5, query_pre_attn_scalar=20),
    "gemma3_text": heads(Gemma3TextConfig, 4, 2, head_dim=8, sliding_window=5, query_pre_attn_scalar=20),
    "gpt_neox": GPTNeoXConfig(**SIZES | {"hidden_size": 48, "num_attention_heads": 6}),
    "gpt2": GPT2Config(vocab_size=100, n_positions=128, n_embd=40, n_layer=2, n_head=5, n_inner=48),
    "phi3": heads(Phi3Config, 16, 2, pad_token_id=0),
    "olmo2": heads(Olmo2Config, 8, 4),
}

# Each of the other families divides by eight as one of these does.
SPLIT_BY_EIGHT = ("qwen2", "llama", "gpt_neox", "gpt2", "gemma2")


def random_params(config):
    """Every parameter, drawn from its name and shape alone."""
    rng = np.random.default_rng(0)
    specs = parameter_specs(config)
    return {name: (rng.normal(size=spec.shape) * 0.2).astype(np.float32) for name, spec in specs.items()}


def run(config, params, capture, arrays, devices, model_parallel):
    """What a step gives on these devices, as numpy arrays."""
    mesh = ModelMesh.of(config, devices, model_parallel)
    placed = {
        name: jax.device_put(params[name], mesh.sharding(spec.axes)) for name, spec in parameter_specs(config).items()
    }
    norm_sites = tuple(site for site in capture.sites if config.site_widths[site] == config.d_model)
    request = StepRequest(capture, "float32", "float32", (*norm_sites, "q", "mlp_act"))
    step = ExtractionStep(Decoder(config, placed), request, mesh)
    output = step(arrays)
    places = np.tile(np.arange(3, 20, dtype=np.int32), (len(arrays.tokens), 1))
    gathered, whole = on_host(begin_copies(gather(output, places))), on_host(begin_copies(output))
    for site, peaks in gathered.peaks.items():
        np.testing.assert_array_equal(peaks, whole.peaks[site][:, :, 3:20])
    found = {"peaks": whole.peaks, "norms": whole.norms, "all": whole.arrays, "gathered": gathered.arrays}
    return found, placed


def worst(ours, theirs, is_token):
    """The largest difference at a token, relative to the array's largest value."""
    return max(
        float(np.abs(ours[site] - theirs[site])[:, is_token].max() / np.abs(theirs[site])[:, is_token].max())
        for site in theirs
    )


def main():
    """Prints, as JSON, the worst difference of each family on each mesh and what share of it a device holds."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(1, 100, (8, 40)).astype(np.int32)
    segments = np.repeat(np.array([[1] * 13 + [2] * 25 + [0] * 2], np.int32), 8, 0)
    positions = np.repeat(np.array([[*range(13), *range(25), 0, 0]], np.int32), 8, 0)
    arrays = StepArrays(tokens, segments, positions)
    assert set(CASES) | {"gemma3"} == set(FAMILIES), "a family is not tested on a mesh"
    devices = jax.devices()
    assert len(devices) == 8
    report = {}
    for family in sys.argv[1:] or CASES:
        config = decoder_config(CASES[family].to_dict())
        capture = Capture(tuple(range(config.n_layers)), tuple(config.site_widths))
        params = random_params(config)
        alone, _ = run(config, params, capture, arrays, devices[:1], 1)
        for model_parallel in (4, 8) if family in SPLIT_BY_EIGHT else (4,):
            split, placed = run(config, params, capture, arrays, devices, model_parallel)
            is_token = {"gathered": segments[:, 3:20] > 0}
            differences = {part: worst(split[part], alone[part], is_token.get(part, segments > 0)) for part in alone}
            held = sum(array.addressable_shards[0].data.nbytes for array in placed.values())
            whole = sum(array.nbytes for array in placed.values())
            request = StepRequest(replace(capture, logits=True), "float32", "float32")
            foretold = device_share(config, request, ModelMesh.of(config, devices, model_parallel))
            shares = {"held": held / whole, "foretold": foretold / whole}
            report[f"{family} {model_parallel}"] = shares | differences
    print(json.dumps(report))


main()
