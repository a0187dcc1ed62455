"""Moments, comparisons of stored vectors, and exports."""

import json
import pickle

import light_mean
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from light_mean import vectors_of
from safetensors import safe_open
from tiny_run import run, write_model

from analysis.mean_vectors import job
from analysis.mean_vectors.commands import FORMATS
from analysis.mean_vectors.exporting import WRITERS
from analysis.mean_vectors.moments import VectorMoments
from analysis.mean_vectors.stored.batches import FailedText, TextId, VectorBatch, decode_batch, encode_batch
from analyze_activations import mean, mean_compare, mean_export
from core.base.errors import UsageError

TEXTS = [f"text {i}" for i in range(7)]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """Both modes of seven texts; beside it another mean, of three of them."""
    folder = tmp_path_factory.mktemp("mean_files")
    model = write_model(folder / "model")
    (folder / "t.pkl").write_bytes(pickle.dumps(TEXTS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_extractor", None)
        light_mean.install()
        for name, count in (("all", 7), ("few", 3)):
            mean(folder / "t.pkl", model, folder / name, layers=[1], mode="both", batch_size=4, num_samples=count)
    return folder / "all"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.floats(-1e4, 1e4), st.integers(0, 99))
def test_moments_of_batches_are_those_of_all_vectors(sizes, center, seed):
    rows = np.random.default_rng(seed).normal(center, 1, (sum(sizes), 3)).astype(np.float32)
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    merged = VectorMoments.of(parts[0])
    for part in parts[1:]:
        merged = merged.merged(VectorMoments.of(part))
    assert merged.count == len(rows)
    if len(rows) > 1:
        wide = rows.astype(np.float64)
        np.testing.assert_allclose(merged.mean, wide.mean(axis=0), rtol=1e-12)
        error = wide.std(axis=0, ddof=1) / np.sqrt(len(rows))
        np.testing.assert_allclose(merged.standard_error(), error, rtol=1e-7)


def test_the_bytes_of_a_batch_depend_on_its_values_alone():
    """Not on which of its texts are one object, and they are read back as they were."""
    shared, copied = "a" * 64, "".join(["a"] * 64)
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)

    def batch(other, vectors):
        texts, failed = (TextId(0, shared), TextId(1, other)), (FailedText(TextId(2, "b"), "x"),)
        return VectorBatch("short", 0, texts, vectors, failed)

    data = encode_batch(batch(shared, rows))
    assert encode_batch(batch(copied, np.asfortranarray(rows))) == data
    found = decode_batch(data)
    assert (found.texts, found.failed) == (batch(copied, rows).texts, batch(copied, rows).failed)
    np.testing.assert_array_equal(found.vectors, rows)
    with pytest.raises(ValueError, match="not finite rows of float32"):
        decode_batch(encode_batch(batch(shared, rows * np.float32(np.nan))))


def cosine(one, other):
    one, other = one.astype(np.float64), other.astype(np.float64)
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def test_stored_vectors_and_other_means_are_compared(output):
    rows = vectors_of(TEXTS, "long")
    found = mean_compare(output, vectors=output, mode="long")
    np.testing.assert_allclose([one.cosine for one in found.compared], [cosine(row, rows.mean(0)) for row in rows])
    assert (found.count, found.failed, len(found.lines())) == (7, 0, 8)
    other = mean_compare(output, other=output.parent / "few", mode="short")
    rows = vectors_of(TEXTS, "short")
    assert other.mean_cosine == pytest.approx(cosine(rows.mean(0), rows[:3].mean(0)), rel=1e-6)


def test_what_cannot_be_compared_is_one_line(output, tmp_path):
    with pytest.raises(UsageError, match="name one of --texts, --vectors and --other"):
        mean_compare(output)
    with pytest.raises(UsageError, match="--mode both: must be one of short, long"):
        mean_compare(output, other=output)
    with pytest.raises(UsageError, match=r"no metadata\.json: it is not an output of `mean`"):
        mean_compare(tmp_path, other=output, mode="short")
    moved = write_model(tmp_path / "m", seed=1)
    with pytest.raises(UsageError, match="not the model of the mean"):
        mean_compare(output, texts=output.parent / "t.pkl", mode="short", model_path=moved)


def test_safetensors_hold_every_array_of_both_modes(output, tmp_path):
    names = mean_export(output, "safetensors", tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as stored:
        assert set(stored.keys()) == set(names)
        assert json.loads(stored.metadata()["count_long"]) == 7
        for mode in ("short", "long"):
            theirs = pickle.loads((output / f"mean_vector_{mode}.pkl").read_bytes())
            for name in ("mean", "normalized", "standard_error"):
                np.testing.assert_array_equal(stored.get_tensor(f"{name}_{mode}"), theirs[name])


def test_npy_holds_one_array_and_pt_all(output, tmp_path):
    theirs = pickle.loads((output / "mean_vector_long.pkl").read_bytes())
    mean_export(output, "npy", tmp_path / "m.npy", mode="long", array="normalized")
    np.testing.assert_array_equal(np.load(tmp_path / "m.npy"), theirs["normalized"])
    with pytest.raises(UsageError, match="--to npy: the file has room for one vector: add --mode short or long"):
        mean_export(output, "npy", tmp_path / "n.npy")
    torch = pytest.importorskip("torch")
    mean_export(output, "pt", tmp_path / "m.pt", mode="long")
    stored = torch.load(tmp_path / "m.pt", weights_only=True)
    np.testing.assert_array_equal(stored["mean_long"].numpy(), theirs["mean"])
    assert (stored["count_long"], stored["layers"]) == (7, [1])


def test_an_export_is_not_written_over_another_file(output, tmp_path):
    (tmp_path / "m.npy").write_text("mine")
    with pytest.raises(UsageError, match="exists with other content"):
        mean_export(output, "npy", tmp_path / "m.npy", mode="short")
    assert (tmp_path / "m.npy").read_text() == "mine"
    assert set(FORMATS) == set(WRITERS)


def test_the_commands_of_two_words(output, tmp_path):
    def command(*words):
        return run("analyze_activations.py", "mean", *words, cwd=tmp_path)

    done = command("export", output, "--to", "npy", "--mode", "short", "--output", "m.npy", "--json")
    assert json.loads(done.stdout) == {"output": "m.npy", "arrays": ["mean_short"]}, done.stderr
    done = command("compare", output, "--vectors", output, "--mode", "short")
    assert len(done.stdout.splitlines()) == 8, done.stderr
    done = command("compare", output)
    assert (done.returncode, "--texts --vectors --other is required" in done.stderr) == (2, True)
