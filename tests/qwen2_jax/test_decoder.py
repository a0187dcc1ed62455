"""What the forward pass keeps, skips and keeps apart."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_reference import SIZES, everything, forward, save, tiny_model, worst_token
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config

from qwen2_jax import SITES, Capture, Decoder, ModelError, load_model, parameter_specs
from qwen2_jax.decoder import layer_runs

TOKENS = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 24))
WINDOWED = Qwen2Config(
    **SIZES,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    use_sliding_window=True,
    sliding_window=6,
    max_window_layers=1,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_model(WINDOWED), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def decoder(folder):
    return load_model(str(folder))


@pytest.fixture(scope="module")
def all_layers(decoder):
    return forward(decoder, TOKENS, everything(decoder))


SUBSETS = [(0,), (3,), (1, 2), (0, 2), (0, 1, 3), (0, 1, 2)]


@pytest.mark.parametrize("layers", SUBSETS)
@pytest.mark.parametrize("sites", [("residual",), ("attn", "resid_mid")])
def test_a_subset_of_layers_equals_the_run_that_keeps_all(layers, sites, decoder, all_layers):
    some = forward(decoder, TOKENS, Capture(layers, sites))
    assert set(some) == set(sites)
    for site in sites:
        assert worst_token(some[site], all_layers[site][list(layers)]) < 1e-6


def test_logits_are_the_same_whatever_is_captured(decoder, all_layers):
    alone = forward(decoder, TOKENS, Capture((), logits=True))
    beside = forward(decoder, TOKENS, Capture((1,), logits=True))
    assert set(alone) == {"logits"}
    assert set(beside) == {"logits", "residual"}
    for found in (alone, beside):
        np.testing.assert_allclose(found["logits"], all_layers["logits"], rtol=1e-5, atol=1e-5)


def test_packed_equals_padded_equals_alone(decoder):
    capture = everything(decoder, logits=False)
    samples = [TOKENS[0, :5], TOKENS[0, 5:19], TOKENS[1, :3], TOKENS[1, 3:20], TOKENS[1, 20:21]]
    rows = [[0, 1], [2, 3, 4]]
    tokens, segments, positions = (np.zeros((2, 24), np.int32) for _ in range(3))
    places = {}
    for row, members in enumerate(rows):
        start = 0
        for segment, sample in enumerate(members, start=1):
            place = places[sample] = (row, slice(start, start + len(samples[sample])))
            tokens[place], segments[place] = samples[sample], segment
            positions[place] = np.arange(len(samples[sample]))
            start = place[1].stop
    packed = forward(decoder, tokens, capture, segments, positions)
    for sample, (row, span) in places.items():
        length = len(samples[sample])
        alone = forward(decoder, samples[sample][None], capture)
        padded = np.full((1, 24), 7), (np.arange(24) < length)[None].astype(int), np.arange(24)[None]
        padded[0][0, :length] = samples[sample]
        in_padding = forward(decoder, padded[0], capture, *padded[1:])
        for site in SITES:
            assert worst_token(packed[site][:, row, span], alone[site][:, 0]) < 3e-6, (sample, site)
            assert worst_token(in_padding[site][:, 0, :length], alone[site][:, 0]) < 3e-6, (sample, site)


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_runs_cover_every_layer_once_and_split_at_captured_ones(captured, beyond):
    end = max(captured) + 1 + beyond
    runs = list(layer_runs(tuple(sorted(captured)), end))
    assert [layer for run, _ in runs for layer in run] == list(range(end))
    assert {layer for run, keeps in runs if keeps for layer in run} == captured
    assert all(a[1] != b[1] for a, b in zip(runs, runs[1:], strict=False))


def compiled(config, capture, *, with_head=False) -> str:
    graph, state = nnx.split(Decoder.abstract(config, jnp.float32, with_head=with_head))
    ints = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    run = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs, capture))
    return run.lower(state, ints, ints, ints).compile().as_text()


def test_what_is_not_asked_for_is_not_compiled(decoder):
    config = decoder.config
    d_ff, vocab = f"[{config.d_ff},{config.d_model}]", f"{config.vocab_size}]"
    first_attention = compiled(config, Capture((0,), ("attn",)), with_head=True)
    assert first_attention.count(" dot(") > 0
    assert not any(d_ff in line.split("parameter")[0] for line in first_attention.splitlines() if " dot(" in line)
    assert " while(" not in first_attention
    assert f"f32[2,24,{vocab}" not in compiled(config, Capture((3,)), with_head=True)
    assert f"f32[48,{vocab}" not in compiled(config, Capture((3,)), with_head=True)


def test_all_layers_are_one_loop_and_an_early_layer_stops_it(decoder):
    everywhere = compiled(decoder.config, Capture((0, 1, 2, 3)))
    assert everywhere.count(" while(") == 1
    assert compiled(decoder.config, Capture((1,))).count(" while(") == 0  # two single layers, inlined
    assert compiled(decoder.config, Capture((2,))).count(" while(") == 1


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (lambda: Capture((0,), ("neurons",)), "site 'neurons' does not exist: choose from resid_pre, attn"),
        (lambda: Capture((1, 0)), "must be ascending"),
        (lambda: Capture((1, 1)), "must be ascending"),
        (lambda: Capture(()), "nothing to capture"),
    ],
)
def test_a_capture_that_means_nothing_is_refused(capture, message):
    with pytest.raises(ModelError, match=message):
        capture()


@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_does_not_exist_is_refused(layer, decoder):
    with pytest.raises(ModelError, match=f"layer {layer} does not exist: this model has layers 0 to 3"):
        forward(decoder, TOKENS, Capture((layer,)))


def test_the_abstract_decoder_has_the_shapes_of_the_loaded_one(decoder):
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.split(each)[1])
        for each in (decoder, Decoder.abstract(decoder.config, jnp.float32))
    ]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert parameter_specs(decoder.config)["layers.q"].shape == (4, 48, 48)


ON_A_MESH = """
import sys
import jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from qwen2_jax import Capture, load_model

mesh = Mesh(np.array(jax.devices()), ("data",))
assert mesh.size == 8
capture = Capture((0, 1, 2, 3), ("residual", "attn"), True)
tokens = np.random.default_rng(0).integers(0, 97, (16, 24))
inputs = tokens, np.ones_like(tokens), np.broadcast_to(np.arange(24), tokens.shape)

def run(decoder, *inputs):
    graph, state = nnx.split(decoder)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs, capture))(state, *inputs)

one = run(load_model(sys.argv[1]), *inputs)
decoder = load_model(sys.argv[1], mesh=mesh)
assert decoder.embedding.sharding.is_fully_replicated and len(decoder.embedding.sharding.device_set) == 8
split = run(decoder, *(jax.device_put(array, NamedSharding(mesh, P("data"))) for array in inputs))
assert split["residual"].sharding.shard_shape(split["residual"].shape)[1] == 2, split["residual"].sharding
for site in one:
    np.testing.assert_allclose(np.asarray(split[site]), np.asarray(one[site]), rtol=1e-5, atol=1e-5)
"""


def test_a_batch_split_over_eight_devices_equals_one_device(folder):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
