"""What the forward pass keeps, skips and keeps apart."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

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


@pytest.mark.parametrize(
    ("layers", "sites"),
    [((0,), ("residual",)), ((1, 2), ("attn", "resid_mid")), ((0, 1, 3), ("mlp",)), ((0, 2), ("resid_pre",))],
)
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
    samples = [TOKENS[0, :5], TOKENS[0, 5:19], TOKENS[1, :17]]
    rows = [[0, 1], [2]]  # with tokens left over at the end of each row
    tokens, segments, positions = (np.zeros((2, 24), np.int32) for _ in range(3))
    places = []
    for row, members in enumerate(rows):
        start = 0
        for segment, sample in enumerate(members, start=1):
            place = row, slice(start, start + len(samples[sample]))
            tokens[place], segments[place] = samples[sample], segment
            positions[place] = np.arange(len(samples[sample]))
            start = place[1].stop
            places.append(place)
    packed = forward(decoder, tokens, capture, segments, positions)
    lengths = np.array([[len(sample)] for sample in samples])
    in_length = np.arange(24) < lengths
    padded_tokens = np.full((3, 24), 7)
    padded_tokens[in_length] = np.concatenate(samples)
    padded = forward(decoder, padded_tokens, capture, in_length.astype(int))
    for sample, (row, span) in enumerate(places):
        alone = forward(decoder, samples[sample][None], capture)
        for site in SITES:
            assert worst_token(packed[site][:, row, span], alone[site][:, 0]) < 3e-6, (sample, site)
            assert worst_token(padded[site][:, sample, in_length[sample]], alone[site][:, 0]) < 3e-6, (sample, site)


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_runs_cover_every_layer_once_and_split_at_captured_ones(captured, beyond):
    end = max(captured) + 1 + beyond
    runs = list(layer_runs(tuple(sorted(captured)), end))
    assert [layer for run, _ in runs for layer in run] == list(range(end))
    assert {layer for run, keeps in runs if keeps for layer in run} == captured
    assert all(a[1] != b[1] for a, b in pairwise(runs))


D_FF, VOCAB, N_LAYERS = 1009, 2003, 37  # sizes that appear in a program for one reason only


@pytest.fixture(scope="module")
def trace(decoder):
    """capture -> the traced forward pass of a decoder that exists only as shapes."""
    config = replace(decoder.config, d_ff=D_FF, vocab_size=VOCAB, n_layers=N_LAYERS, windows=(None,) * N_LAYERS)
    graph, state = nnx.split(Decoder.abstract(config, jnp.float32))
    ints = jax.ShapeDtypeStruct((2, 24), jnp.int32)
    return lambda capture: jax.jit(lambda s, *xs: nnx.merge(graph, s)(*xs, capture)).trace(state, ints, ints, ints)


def test_logits_and_the_mlp_of_the_last_layer_are_not_compiled_unless_asked(trace):
    attention_only = trace(Capture((0,), ("attn",))).lower().compile().as_text()
    assert f"{D_FF}" not in attention_only
    assert f"[2,24,{VOCAB}" not in attention_only
    assert f"{D_FF}" in trace(Capture((0,), ("mlp",))).lower().compile().as_text()
    assert f"[2,24,{VOCAB}" in trace(Capture((), logits=True)).lower().compile().as_text()


@pytest.mark.parametrize(
    ("layers", "loops"),
    [(range(N_LAYERS), [37]), ([20], [20]), ([9, 36], [9, 26]), ([0, 1], [2]), ([0], [])],
)
def test_each_run_of_layers_is_one_loop_that_ends_with_the_last_captured_layer(layers, loops, trace):
    jaxpr = trace(Capture(tuple(layers))).jaxpr
    over_layers = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert over_layers == loops


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
placed = [jax.device_put(array, NamedSharding(mesh, P("data"))) for array in inputs]
split = run(decoder, *placed)

graph, state = nnx.split(decoder)
of_a_device = lambda state, *inputs: nnx.merge(graph, state)(*inputs, capture)
out_specs = {"residual": P(None, "data"), "attn": P(None, "data"), "logits": P("data")}
mapped = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=(P(), *[P("data")] * 3), out_specs=out_specs))
assert "all-" not in mapped.lower(state, *placed).compile().as_text()
mapped = mapped(state, *placed)
assert mapped["residual"].sharding.shard_shape(mapped["residual"].shape)[1] == 2
for site in one:
    for found in (split, mapped):
        np.testing.assert_allclose(np.asarray(found[site]), np.asarray(one[site]), rtol=1e-5, atol=1e-5)
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
