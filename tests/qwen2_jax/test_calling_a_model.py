"""A loaded model in a notebook: called on token ids, printed, and looked into."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hf_reference import SIZES, hf_activations, save, tiny_model, worst_token
from jax.sharding import PartitionSpec
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from core.base.errors import ModelError
from qwen2_jax import Capture, Decoder, load_model, parameter_specs

ROPE = {"rope_type": "default", "rope_theta": 1e4}
GROUPED = SIZES | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "rope_parameters": ROPE}
MODELS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**GROUPED, head_dim=12, sliding_window=5, query_pre_attn_scalar=20),
    "gpt_neox": GPTNeoXConfig(**SIZES, hidden_size=48, num_attention_heads=6),
    "gpt2": GPT2Config(vocab_size=97, n_positions=64, n_embd=48, n_layer=4, n_head=6),
}
RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(0, 97, n).tolist() for n in (9, 1, 17)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """kind -> a model of transformers and ours with the same weights."""
    loaded = {}

    def load(kind):
        if kind not in loaded:
            theirs = tiny_model(MODELS[kind])
            loaded[kind] = theirs, load_model(str(save(theirs, tmp_path_factory.mktemp(kind))))
        return loaded[kind]

    return load


@pytest.fixture
def model(pair) -> Decoder:
    return pair("llama")[1]


@pytest.mark.parametrize("kind", MODELS)
def test_the_logits_of_a_text_are_those_of_transformers(kind, pair):
    theirs, ours = pair(kind)
    with torch.no_grad():
        expected = theirs(torch.tensor([TEXTS[0]])).logits[0].numpy()
    logits = ours(TEXTS[0])
    assert logits.shape == (9, 97)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_a_capture_gives_the_layers_of_each_site_that_transformers_has_there(pair):
    theirs, ours = pair("llama")
    expected = hf_activations(theirs, np.array([TEXTS[2]]))
    capture = Capture((1, 3), ("residual", "q", "final_norm"), logits=True)
    taps = ours(np.array(TEXTS[2]), capture)
    assert set(taps) == {"residual", "q", "final_norm", "logits"}
    assert worst_token(np.asarray(taps["residual"]), expected["residual"][[1, 3], 0]) < 1e-5
    assert worst_token(np.asarray(taps["q"]), expected["q"][[1, 3], 0]) < 1e-5
    assert worst_token(np.asarray(taps["final_norm"]), expected["final_norm"][:, 0]) < 1e-5
    assert worst_token(np.asarray(taps["logits"]), expected["logits"][0]) < 1e-5


def test_a_list_of_texts_gives_each_what_it_gets_alone(model):
    capture = Capture((2,), ("residual", "attn"))
    for text, logits, taps in zip(TEXTS, model(TEXTS), model(TEXTS, capture=capture), strict=True):
        np.testing.assert_allclose(logits, model(text), rtol=1e-5, atol=1e-5)
        alone = model(text, capture=capture)
        assert alone["attn"].shape == (1, len(text), 48)
        for site in ("residual", "attn"):
            np.testing.assert_allclose(taps[site], alone[site], rtol=1e-5, atol=1e-5)


def test_an_array_of_texts_of_one_length_keeps_its_axes(model):
    texts = RNG.integers(0, 97, (3, 5))
    logits, taps = model(texts), model(jax.numpy.asarray(texts), Capture((0, 1)))
    assert (logits.shape, taps["residual"].shape) == ((3, 5, 97), (2, 3, 5, 48))
    for row, text in enumerate(texts):
        np.testing.assert_allclose(logits[row], model(text), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            taps["residual"][:, row], model(text, Capture((0, 1)))["residual"], rtol=1e-5, atol=1e-5
        )


def test_texts_longer_than_a_block_of_a_kernel_keep_their_length(tmp_path):
    model = load_model(str(save(tiny_model(LlamaConfig(**GROUPED | {"max_position_embeddings": 400})), tmp_path)))
    found = model([[5] * 130, [6] * 300])
    assert [logits.shape for logits in found] == [(130, 97), (300, 97)]


@pytest.mark.parametrize(
    ("token_ids", "reason"),
    [
        ([], "no texts: give the token ids of at least one"),
        ([[1], []], r"shape \(0,\)"),
        ([1.5, 2.0], "float64: a text is a list of at least one integer"),
        ([[[1]]], r"token ids of shape \(1, 1\)"),
        ([3, 97], "token id 97 does not exist: the vocabulary has 0 to 96"),
        ([3, -1], "token id -1 does not exist"),
        ([1] * 129, "a text has 129 tokens, the model knows 128 positions"),
    ],
)
def test_what_is_no_text_of_this_model_is_refused(token_ids, reason, model):
    with pytest.raises(ModelError, match=reason):
        model(token_ids)


def test_a_layer_that_does_not_exist_is_refused_before_anything_runs(model):
    with pytest.raises(ModelError, match="layer 4 does not exist: this model has layers 0 to 3"):
        model(TEXTS[0], Capture((4,)))


def test_it_prints_its_parts_with_their_shapes(model):
    printed = repr(model)
    assert re.search(
        r"attn=Attention\(.*q=Linear\(.*shape=\(4, 48, 48\).*mlp=Mlp\(.*shape=\(4, 52, 48\)", printed, re.S
    )
    assert "out_sharding=('layers', 'heads', 'embed')" in printed
    assert "final_norm=Norm(" in printed
    assert "lm_head=Linear(" in printed


@pytest.mark.parametrize("kind", MODELS)
def test_parameters_have_the_names_shapes_and_axes_of_their_specs(kind, pair):
    model = pair(kind)[1]
    specs = parameter_specs(model.config)
    found = {".".join(map(str, path)): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert found.keys() == specs.keys()
    for name, param in found.items():
        assert param[...].shape == specs[name].shape
        assert param.out_sharding == specs[name].axes


def test_flax_reads_the_axes_of_the_parameters(model):
    specs = nnx.get_partition_spec(nnx.state(model))
    assert specs["layers"]["attn"]["o"]["weight"] == PartitionSpec("layers", "embed", "heads")
    assert specs["embedding"] == PartitionSpec("vocab", "embed")
