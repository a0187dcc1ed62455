"""`extract_activations.capture`: the activations of a run, in memory."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import D_MODEL, N_LAYERS, token_lines, write_jsonl, write_model

from analyze_activations import verify
from core.base.errors import RunError, UsageError
from core.in_memory.capturer import load_capturer
from create_dataset_streams import create_streams
from extract_activations import capture, extract, price
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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"layer": 3}, "layer: no such argument: did you mean layers_to_extract"),
        ({"plan": True}, "call `price` to price a run"),
        ({"batch_size": "4"}, "batch_size='4': must be a whole number"),
        ({"max_seq_length": 2.5}, r"max_seq_length=2\.5: must be a whole number"),
        ({"layers_to_extract": [True]}, "layers_to_extract=True: must be a whole number"),
        ({"pack": 1}, "pack=1: must be True or False"),
        ({"backend": "tf"}, "--backend tf: must be one of auto, jax, torch"),
        ({"compute_dtype": "float64"}, "--compute_dtype float64: must be one of"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(flags, message):
    with pytest.raises(UsageError, match=message):
        extract("m", "s", **flags)


def test_paths_and_numbers_of_numpy_are_taken(model, tmp_path):
    stream = create_streams(write_jsonl(tmp_path / "s.jsonl", LINES[:3]), tmp_path / "streams").streams[0].path
    flags = {
        "checkpoint_dir": tmp_path / "ck",
        "batch_size": np.int32(2),
        "output_dir": tmp_path / "out",
    }
    summary = extract(Path(model), Path(stream), layers_to_extract=np.arange(2), quiet=True, **flags)
    assert verify(tmp_path / "out").ok
    assert summary.samples == 3
    assert list(capture(Path(model), np.array([3, 4]), layers=np.int64(1))["residual"]) == [1]
    assert price(model, stream, output_dir=tmp_path / "out", layers_to_extract=[0, 1], batch_size=2).samples == 0


def exponential_mean(tokens: np.ndarray, share: float) -> np.ndarray:
    """The mean of (T, D) with weights that halve every share * T tokens, from the last one backwards, in float64."""
    backwards = tokens[::-1].astype(np.float64)
    weights = np.exp(-np.log(2) * np.arange(len(tokens)) / (share * len(tokens)))
    return weights @ backwards / weights.sum()


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_pools_are_those_of_the_tokens(model, backend):
    whole = capture(model, IDS, layers=[0, 2], backend=backend)["residual"]
    pooled = capture(model, IDS, layers=[0, 2], pool=["last", "exp:0.067", "exp:0.159"], backend=backend)["residual"]
    for layer, samples in whole.items():
        for tokens, pools in zip(samples, pooled[layer], strict=True):
            expected = [tokens[-1], exponential_mean(tokens, 0.067), exponential_mean(tokens, 0.159)]
            np.testing.assert_allclose(pools, np.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_capturer_is_loaded_once_for_many_calls(model):
    capturer = load_capturer(model, layers=1)
    for part in (IDS[:5], IDS[5:9]):
        found, expected = capturer(part)["residual"][1], capture(model, part, layers=1)["residual"][1]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert capturer.token_ids("ab")[0].tolist() == capturer.tokenizer("ab")["input_ids"]


def test_a_pool_that_does_not_exist_is_refused(model):
    with pytest.raises(UsageError, match="exp:SHARE"):
        capture(model, IDS, pool="exp")
