"""`extract_activations.capture`: the activations of a run, in memory."""

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import D_MODEL, N_LAYERS, token_lines, write_jsonl, write_model

from core.base.errors import RunError, UsageError
from extract_activations import capture, extract
from qwen2_jax import load_model, load_tokenizer

LINES = token_lines(20, seed=3)
IDS = [line["input_ids"] for line in LINES]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("pack", [True, False])
def test_it_is_bit_for_bit_what_a_run_stores(model, tmp_path, pack):
    stream = write_jsonl(tmp_path / "s.jsonl", LINES)
    sites, layers = ["residual", "attn", "embedding"], [0, 2]
    flags = {"dtype": "float32", "format": "safetensors", "checkpoint_dir": str(tmp_path / "ck"), "pack": pack}
    extract(
        model, str(stream), layers_to_extract=layers, activation_type=sites, output_dir=str(tmp_path / "out"), **flags
    )
    found = capture(model, IDS, layers=layers, sites=sites, pack=pack, max_seq_length=2048)
    assert {site: list(of_site) for site, of_site in found.items()} == {
        "embedding": [-1],
        "attn": layers,
        "residual": layers,
    }
    for site, of_site in found.items():
        stored = load_file(tmp_path / f"out/tpu_0/{site}/shard_0001.safetensors")
        for layer, arrays in of_site.items():
            np.testing.assert_array_equal(np.concatenate(arrays), stored[f"layer_{layer}"])


def test_a_loaded_model_gives_what_its_path_gives_and_is_compiled_once_for_a_capture(model):
    loaded = load_model(model)
    expected = capture(model, IDS, layers=1)
    for _ in range(2):
        found = capture(loaded, IDS, layers=1)
        for ours, theirs in zip(found["residual"][1], expected["residual"][1], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_weights_that_are_changed_in_place_count_at_once(model):
    loaded = load_model(model)
    before = capture(loaded, [1, 2, 3], sites="embedding")["embedding"][-1][0]
    loaded.embedding[...] = 2 * loaded.embedding[...]
    np.testing.assert_array_equal(capture(loaded, [1, 2, 3], sites="embedding")["embedding"][-1][0], 2 * before)


def test_texts_are_tokenized_as_the_tokenizer_does_and_may_stand_beside_token_ids(model):
    tokenizer = load_tokenizer(model)
    texts = ["one text", "another, longer one"]
    found = capture(model, [*texts, [5, 6]], layers=[0])["residual"][0]
    ids = capture(load_model(model), [*tokenizer(texts)["input_ids"], np.array([5, 6])], layers=[0])["residual"][0]
    assert [array.shape for array in found] == [(8, D_MODEL), (19, D_MODEL), (2, D_MODEL)]
    for ours, theirs in zip(found, ids, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    single = capture(load_model(model), "one text", layers=[0], tokenizer=tokenizer)["residual"][0]
    np.testing.assert_allclose(single[0], found[0], rtol=1e-5, atol=1e-5)


def test_no_samples_give_no_arrays(model):
    assert capture(model, [], layers=[1]) == {"residual": {1: []}}


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ("", {}, r"samples\[0\]: it has no tokens"),
        ([[1], []], {}, r"samples\[1\]: it has no tokens"),
        ([["a"]], {}, r"samples\[0\]: neither a text nor a list of token ids"),
        (5, {}, "samples: a text, a list of token ids, or a list of such"),
        ([[1, 10**6]], {}, r"samples\[0\]: its token ids are not all in 0\.\.319"),
        ([[1] * 5000], {}, r"samples\[0\]: 5000 tokens, and .* knows 4096 positions"),
        ("a", {"layers": 7}, rf"layers 7: .* has layers 0 to {N_LAYERS - 1}"),
        ("a", {"sites": "nope"}, "sites nope: no site has this name"),
        ("a", {"dtype": "int8"}, "dtype 'int8': must be one of"),
    ],
)
def test_what_cannot_be_is_one_line(model, samples, options, message):
    with pytest.raises(UsageError, match=message):
        capture(model, samples, **{"layers": 0} | options)


def test_a_loaded_model_needs_a_tokenizer_for_texts_and_keeps_its_dtype(model):
    loaded = load_model(model)
    with pytest.raises(UsageError, match="tokenizer: a loaded model takes token ids"):
        capture(loaded, "a text")
    with pytest.raises(UsageError, match="compute_dtype bfloat16: the model is loaded in float32"):
        capture(loaded, [1], compute_dtype="bfloat16")


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path):
    loud = write_model(tmp_path / "loud", scale=1e6)
    with pytest.raises(RunError, match=r"samples\[0\], embedding .*, token 0: magnitude .* does not fit float16"):
        capture(str(loud), [3, 4], sites="embedding", dtype="float16")


def test_flags_that_do_not_exist_are_refused_by_the_functions_too(tmp_path):
    with pytest.raises(UsageError, match="layer: there is no such flag"):
        extract("m", "s", layer=3)
    with pytest.raises(UsageError, match="`price` is the function"):
        extract("m", "s", plan=True)
