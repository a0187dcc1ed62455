"""Vectors of a GPT-NeoX against transformers' hidden states, pooled in float64 as docs/mean_vectors.md says."""

import json
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file
from tiny_run import _write_tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from analyze_activations import mean, mean_compare
from qwen2_jax import load_tokenizer

D_MODEL, LAYERS = 32, (0, 1, 2)
TEXTS = ["a", "two words", "x" * 40, *(f"sentence {i}, " * (1 + 3 * i) for i in range(6))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Four layers: the last of transformers' hidden states is behind the final norm."""
    folder = tmp_path_factory.mktemp("neox")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=320,
        hidden_size=D_MODEL,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=257,
        eos_token_id=257,
    )
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def hidden(model):
    """Of each text (L, T, D) in float64: the residual stream after each of `LAYERS`."""
    theirs, tokenizer = GPTNeoXForCausalLM.from_pretrained(model).eval(), load_tokenizer(str(model))
    found = []
    with torch.no_grad():
        for text in TEXTS:
            states = theirs(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True).hidden_states
            found.append(np.stack([states[layer + 1][0].double().numpy() for layer in LAYERS]))
    return found


def pooled(states, share):
    """The pool of (L, T, D) with half-life share * T, from the last token backwards: (L, D)."""
    backwards = states[:, ::-1]
    n = backwards.shape[1]
    weights = np.exp(-np.log(2) * np.arange(n) / (share * n))
    return np.einsum("t,ltd->ld", weights / weights.sum(), backwards)


def expected(states, mode):
    if mode == "short":
        return pooled(states, 0.067).mean(axis=0)
    return np.concatenate([states[:, -1], *(pooled(states, f) for f in (0.023, 0.067, 0.159))], axis=1).mean(axis=0)


@pytest.fixture(scope="module")
def output(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("means")
    (folder / "training_data.pkl").write_bytes(pickle.dumps(TEXTS))
    mean(folder / "training_data.pkl", model, folder / "vectors", layers=[2, 0, 1], mode="both", batch_size=5)
    return folder / "vectors"


@pytest.mark.parametrize(("mode", "width"), [("short", D_MODEL), ("long", 4 * D_MODEL)])
def test_vectors_mean_and_standard_error_are_those_of_transformers(output, hidden, mode, width):
    batches = [pickle.loads((output / f"vectors_{mode}/batch_00{i}.pkl").read_bytes()) for i in range(2)]
    found = np.concatenate([batch["vectors"] for batch in batches])
    reference = np.stack([expected(states, mode) for states in hidden])
    assert found.shape == reference.shape == (len(TEXTS), width)
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-5)
    stored = pickle.loads((output / f"mean_vector_{mode}.pkl").read_bytes())
    mean_vector = reference.mean(axis=0)
    np.testing.assert_allclose(stored["mean"], mean_vector, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stored["normalized"], mean_vector / np.linalg.norm(mean_vector), rtol=1e-4, atol=1e-5)
    error = reference.std(axis=0, ddof=1) / np.sqrt(len(TEXTS))
    np.testing.assert_allclose(stored["standard_error"], error, rtol=1e-3, atol=1e-6)


def test_the_cosine_of_a_text_is_that_of_its_vector(output, hidden, tmp_path):
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS[:3], ""]))
    found = mean_compare(output, texts=tmp_path / "other.jsonl", mode="short")
    center = np.stack([expected(states, "short") for states in hidden]).mean(axis=0)
    vectors = [expected(states, "short") for states in hidden[:3]]
    cosines = [vector @ center / np.linalg.norm(vector) / np.linalg.norm(center) for vector in vectors]
    np.testing.assert_allclose([one.cosine for one in found.compared[:3]], cosines, rtol=1e-5)
    assert (found.compared[3].failed, found.count, found.failed) == ("no tokens", 3, 1)
    assert found.mean_cosine == pytest.approx(np.mean(cosines))


def test_a_text_that_fails_leaves_the_others_as_they_are(model, hidden, tmp_path):
    """Empty, half a surrogate pair, too long, and a token whose embedding is NaN, in one batch."""
    weights = load_file(model / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][load_tokenizer(str(model))("~")["input_ids"][0]] = np.nan
    folder = tmp_path / "nan"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    texts = ["", TEXTS[0], "\ud800", TEXTS[1], "with ~ in it", TEXTS[2], "y" * 60]
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(texts))
    options = {"layers": LAYERS, "max_seq_length": 50, "overlong": "refuse"}
    summary = mean(tmp_path / "t.pkl", folder, tmp_path / "out", **options)
    batch = pickle.loads((tmp_path / "out/vectors_short/batch_000.pkl").read_bytes())
    assert batch["sample_idx"] == [1, 3, 5]
    np.testing.assert_allclose(batch["vectors"], [expected(one, "short") for one in hidden[:3]], rtol=1e-4, atol=1e-5)
    assert {one["sample_idx"]: one["reason"] for one in batch["failed"]} == {
        0: "no tokens",
        2: "half of a surrogate pair",
        4: "residual of layer 0, pool 0: the model computes NaN or infinity",
        6: "60 tokens, more than 50",
    }
    assert (summary.vectors, summary.failed) == (3, 4)
