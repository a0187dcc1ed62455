"""What the forward pass keeps, skips and keeps apart."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hf_reference import SIZES, everything, forward, save, tiny_model, worst_token
from transformers import Olmo2Config, Qwen2Config

from core.base.errors import ModelError
from qwen2_jax import Capture, Decoder, load_config, load_model, parameter_specs
from qwen2_jax.taps import SITES

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
    [
        ((0,), ("residual",)),
        ((1, 2), ("attn", "q", "resid_mid")),
        ((0, 1, 3), ("mlp", "mlp_act")),
        ((0, 2), ("resid_pre", "embedding")),
        ((1,), ("k", "v", "attn_heads", "final_norm")),
        ((), ("embedding",)),
        ((), ("final_norm", "embedding")),
    ],
)
def test_a_subset_of_layers_and_sites_equals_the_run_that_keeps_all(layers, sites, decoder, all_layers):
    capture = Capture(layers, sites)
    some = forward(decoder, TOKENS, capture)
    assert set(some) == set(sites)
    for site in sites:
        kept = list(layers) if SITES[site].per_layer else [0]
        assert some[site].shape[0] == len(capture.layers_of(site, decoder.config.n_layers))
        assert some[site].shape[-1] == decoder.config.site_widths[site]
        assert worst_token(some[site], all_layers[site][kept]) < 1e-6


def test_logits_are_the_same_whatever_is_captured(decoder, all_layers):
    alone = forward(decoder, TOKENS, Capture((), logits=True))
    beside = forward(decoder, TOKENS, Capture((1,), logits=True))
    assert set(alone) == {"logits"}
    assert set(beside) == {"logits", "residual"}
    for found in (alone, beside):
        np.testing.assert_allclose(found["logits"], all_layers["logits"], rtol=1e-5, atol=1e-5)


D_FF, VOCAB, N_LAYERS = 1009, 2003, 37  # sizes that appear in a program for one reason only


@pytest.fixture(scope="module")
def trace(decoder):
    """capture -> the traced forward pass of a decoder that exists only as shapes."""
    config = replace(decoder.config, d_ff=D_FF, vocab_size=VOCAB, n_layers=N_LAYERS, windows=(None,) * N_LAYERS)
    graph, state = nnx.split(Decoder.abstract(config, jnp.float32))
    ints = jax.ShapeDtypeStruct((2, 24), jnp.int32)

    def traced(capture):
        forward = jax.jit(lambda state, *inputs: nnx.merge(graph, state).forward(*inputs, capture))
        return forward.trace(state, ints, ints, ints)

    return traced


def test_logits_and_the_mlp_of_the_last_layer_are_not_compiled_unless_asked(trace):
    attention_only = trace(Capture((0,), ("attn",))).lower().compile().as_text()
    assert f"{D_FF}" not in attention_only
    attention_of_two = trace(Capture((3, 7), ("attn",))).lower().compile().as_text()
    assert attention_of_two.count(" dot(") == trace(Capture((3, 7))).lower().compile().as_text().count(" dot(") + 6
    assert f"[2,24,{VOCAB}" not in attention_only
    assert f"{D_FF}" in trace(Capture((0,), ("mlp",))).lower().compile().as_text()
    assert f"[2,24,{VOCAB}" in trace(Capture((), logits=True)).lower().compile().as_text()


def test_sites_before_the_attention_cost_no_attention_and_those_once_a_token_no_block(trace):
    def dots(capture):
        return trace(capture).lower().compile().as_text().count(" dot(")

    assert dots(Capture((0,), ("q",))) == 1
    assert dots(Capture((0,), ("k", "v"))) == 2
    assert dots(Capture((0,), ("attn_heads",))) == 5
    assert dots(Capture((), ("embedding",))) == 0


@pytest.mark.parametrize(
    ("layers", "loops"),
    [(range(N_LAYERS), [37]), (range(1, N_LAYERS, 2), [36]), ([9, 36], [37]), ([0, 1], [2]), ([20], [20]), ([0], [])],
)
def test_the_layers_are_one_loop_that_ends_with_the_last_captured_layer(layers, loops, trace):
    jaxpr = trace(Capture(tuple(layers))).jaxpr
    over_layers = [e.params["length"] for e in jaxpr.eqns if e.primitive.name == "scan"]
    assert over_layers == loops


def test_every_other_layer_costs_no_larger_program_and_no_more_memory_than_all(trace):
    programs = [trace(Capture(layers)).lower().compile() for layers in (tuple(range(N_LAYERS)), tuple(range(0, 37, 2)))]
    text_of_all, text_of_some = (len(program.as_text()) for program in programs)
    memory_of_all, memory_of_some = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert text_of_some <= 1.3 * text_of_all
    assert memory_of_some <= memory_of_all


def test_layers_that_are_captured_are_written_where_they_stay(trace):
    """In place: beside its outputs the program needs no room that grows with them."""
    few, many = (
        trace(Capture(tuple(range(0, n, 2)))).lower().compile().memory_analysis().temp_size_in_bytes for n in (5, 37)
    )
    assert many <= few + 2 * 24 * 48 * 4


@pytest.mark.parametrize(
    ("capture", "message"),
    [
        (lambda: Capture((0,), ("neurons",)), "site 'neurons' does not exist: choose from embedding, resid_pre"),
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


@pytest.mark.parametrize("site", ["attn_proj", "mlp_proj"])
def test_a_site_that_the_block_does_not_have_is_refused(site, decoder):
    with pytest.raises(
        ModelError, match=f"site '{site}' does not exist in a qwen2 block: choose from embedding, resid"
    ):
        forward(decoder, TOKENS, Capture((0,), (site,)))


def test_the_final_norm_can_be_had_without_the_head(folder, decoder, all_layers):
    headless = load_model(str(folder), with_head=False)
    assert (headless.final_norm is None, headless.lm_head) == (False, None)
    found = forward(headless, TOKENS, Capture((), ("final_norm",)))
    assert worst_token(found["final_norm"], all_layers["final_norm"]) < 1e-6
    with pytest.raises(ModelError, match="logits need the final norm and the output head"):
        forward(headless, TOKENS, Capture((), logits=True))
    bare = load_model(str(folder), with_head=False, with_final_norm=False)
    with pytest.raises(ModelError, match="the final norm is not loaded: load all layers with with_final_norm=True"):
        forward(bare, TOKENS, Capture((), ("final_norm",)))


def test_sites_and_parameters_follow_the_block(tmp_path):
    olmo2 = load_config(str(save(tiny_model(Olmo2Config(**SIZES, hidden_size=48, num_attention_heads=6)), tmp_path)))
    sandwich = replace(olmo2, pre_norm=True)
    assert list(sandwich.site_widths) == list(SITES)  # in their order
    parallel = replace(sandwich, post_norm=False, parallel=True, norm="layer")
    assert set(SITES) - set(parallel.site_widths) == {"attn_proj", "mlp_proj", "resid_mid"}
    assert olmo2.site_widths["q"] == 48
    assert replace(sandwich, n_heads=3, n_kv_heads=1, head_dim=10).site_widths == dict.fromkeys(SITES, 48) | {
        "q": 30,
        "k": 10,
        "v": 10,
        "attn_heads": 30,
        "mlp_act": 52,
    }
    names = parameter_specs(olmo2)
    assert "layers.attn_norm.weight" not in names
    assert names["layers.attn.q_norm.weight"].axes == ("layers", "heads")
    assert parameter_specs(parallel)["layers.mlp_norm.bias"].shape == (4, 48)
    assert "final_norm.weight" not in parameter_specs(olmo2, with_final_norm=False, with_head=False)


def test_the_abstract_decoder_has_the_shapes_of_the_loaded_one(decoder):
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.split(each)[1])
        for each in (decoder, Decoder.abstract(decoder.config, jnp.float32))
    ]
    assert jax.tree.leaves(shapes[0]) == jax.tree.leaves(shapes[1])
    assert parameter_specs(decoder.config)["layers.attn.q.weight"].shape == (4, 48, 48)


ON_A_MESH = """
import sys
import jax, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from qwen2_jax import Capture, load_config, load_model
from qwen2_jax.sharding import ModelMesh

whole = ModelMesh.of(load_config(sys.argv[1]), jax.devices())
mesh = whole.mesh
assert mesh.size == 8
capture = Capture((0, 1, 2, 3), ("residual", "attn"), True)
tokens = np.random.default_rng(0).integers(0, 97, (16, 24))
inputs = tokens, np.ones_like(tokens), np.broadcast_to(np.arange(24), tokens.shape)

def run(decoder, *inputs):
    graph, state = nnx.split(decoder)
    return jax.jit(lambda state, *inputs: nnx.merge(graph, state).forward(*inputs, capture))(state, *inputs)

one = run(load_model(sys.argv[1]), *inputs)
decoder = load_model(sys.argv[1], mesh=whole)
assert decoder.embedding.sharding.is_fully_replicated and len(decoder.embedding.sharding.device_set) == 8
placed = [jax.device_put(array, NamedSharding(mesh, P("data"))) for array in inputs]
split = run(decoder, *placed)

graph, state = nnx.split(decoder)
of_a_device = lambda state, *inputs: nnx.merge(graph, state).forward(*inputs, capture)
out_specs = {"residual": P(None, "data"), "attn": P(None, "data"), "logits": P("data")}
in_specs = (P(), *[P("data")] * 3)
mapped = jax.jit(jax.shard_map(of_a_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False))
assert "all-" not in mapped.lower(state, *placed).compile().as_text()
mapped = mapped(state, *placed)

over_two = load_model(sys.argv[1], mesh=ModelMesh.of(load_config(sys.argv[1]), jax.devices(), 2))
assert over_two.layers.mlp.up.weight[...].sharding.shard_shape((4, 52, 48)) == (4, 26, 48)
texts = [tokens[0, :5], tokens[1], tokens[2, :9]]
alone = load_model(sys.argv[1])
for asked in (None, capture):
    for one_text, of_split in zip(alone(texts, asked), over_two(texts, asked), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one_text, of_split)
assert mapped["residual"].sharding.shard_shape(mapped["residual"].shape)[1] == 2
for site in one:
    for found in (split, mapped):
        np.testing.assert_allclose(np.asarray(found[site]), np.asarray(one[site]), rtol=1e-5, atol=1e-5)
"""


def test_a_batch_split_over_eight_devices_equals_one_device(folder):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, str(folder)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
