"""A run of `mean` with a light model: what is stored, resumed, extended and refused."""

import pickle

import light_mean
import numpy as np
import pytest
from forks import environment, shared
from light_mean import vectors_of
from tiny_run import committed_files, write_model

from analysis.mean_vectors import job
from analyze_activations import mean
from core.base.errors import RunError, UsageError
from core.object_store import open_store

TEXTS = [f"text {i}" for i in range(25)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("mean_runs")))


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    monkeypatch.setattr(job, "load_extractor", None)
    return light_mean.install()


def write(path, texts=TEXTS):
    path.write_bytes(pickle.dumps(texts))
    return str(path)


def run(tmp_path, model, *, texts=TEXTS, output="out", **options):
    data = write(tmp_path / "texts.pkl", texts)
    given = {"layers": [0, 2], "mode": "both", "batch_size": 10} | options
    return mean(data, model, tmp_path / output, **given)


def steps(loaded):
    return [len(step) for extractor in loaded for step in extractor.steps]


def stored(path):
    """As anybody reads it."""
    return pickle.loads(path.read_bytes())


def test_the_folder_holds_what_is_described(tmp_path, model):
    summary = run(tmp_path, model)
    assert set(committed_files(tmp_path / "out")) == {
        *(f"vectors_{mode}/batch_{i:03d}.pkl" for mode in ("short", "long") for i in range(3)),
        *("mean_vector_short.pkl", "mean_vector_long.pkl", "metadata.json"),
    }
    for mode in ("short", "long"):
        batches = [stored(tmp_path / f"out/vectors_{mode}/batch_{i:03d}.pkl") for i in range(3)]
        assert [place for batch in batches for place in batch["sample_idx"]] == list(range(25))
        rows = np.concatenate([batch["vectors"] for batch in batches])
        np.testing.assert_array_equal(rows, vectors_of(TEXTS, mode))
        found, wide = stored(tmp_path / f"out/mean_vector_{mode}.pkl"), rows.astype(np.float64)
        expected = wide.mean(axis=0)
        np.testing.assert_allclose(found["mean"], expected, rtol=1e-6)
        np.testing.assert_allclose(found["normalized"], expected / np.linalg.norm(expected), rtol=1e-6)
        np.testing.assert_allclose(found["standard_error"], wide.std(axis=0, ddof=1) / 5, rtol=1e-5)
        assert (found["count"], found["mode"], found["layers"]) == (25, mode, [0, 2])
        assert {found[name].dtype for name in ("mean", "normalized", "standard_error")} == {np.dtype(np.float32)}
        assert summary.norms[mode] == pytest.approx(np.linalg.norm(expected))
    assert (summary.texts, summary.vectors, summary.computed, summary.failed) == (25, 25, 25, 0)


def test_a_finished_run_loads_no_model_and_changes_no_byte(tmp_path, model, loaded):
    run(tmp_path, model)
    before = committed_files(tmp_path / "out")
    assert run(tmp_path, model, layers=[2, 0]).computed == 0
    assert (steps(loaded), len(loaded)) == ([10, 10, 5], 1)
    assert committed_files(tmp_path / "out") == before


@pytest.mark.parametrize(
    "fault",
    [
        *({"ACTIVATIONS_FAULT": f"disk.{point}=kill"} for point in ("synced@1", "linked@1", "linked@2", "synced@6")),
        *({light_mean.KILLED_REPLACING: name} for name in ("mean_vector_long.pkl", "metadata.json")),
    ],
    ids=lambda fault: "".join(fault.values()),
)
def test_a_killed_run_ends_with_the_bytes_of_an_undisturbed_one(tmp_path, model, fault):
    """Its files: metadata, short and long of three batches, both means, metadata again."""
    run(tmp_path, model, output="calm")
    words = ["mean", tmp_path / "texts.pkl", "--model_path", model, "--layers", 0, 2, "--mode", "both"]
    words += ["--batch_size", 10, "--output", tmp_path / "out", "--json"]
    script = "tests/analysis/mean_vectors/light_mean.py"
    killed = shared().command(script, *words, cwd=tmp_path, env=environment(**fault))
    assert killed.wait() == -9, killed.errors
    assert shared().command(script, *words, cwd=tmp_path).finish()["vectors"] == 25
    assert committed_files(tmp_path / "out") == committed_files(tmp_path / "calm")


def test_more_samples_reuse_every_whole_batch_and_give_the_bytes_of_one_run(tmp_path, model, loaded):
    run(tmp_path, model, num_samples=15)
    assert run(tmp_path, model, num_samples=25).computed == 15
    assert steps(loaded) == [10, 5, 10, 5]
    run(tmp_path, model, num_samples=25, output="at_once")
    assert committed_files(tmp_path / "out") == committed_files(tmp_path / "at_once")


def test_another_source_may_be_appended(tmp_path, model, loaded):
    first, second = write(tmp_path / "a.pkl", TEXTS[:20]), write(tmp_path / "b.pkl", TEXTS[20:])
    options = {"layers": [0], "batch_size": 10}
    mean(first, model, tmp_path / "out", **options)
    mean([first, second], model, tmp_path / "out", **options)
    assert steps(loaded) == [10, 10, 5]


def test_a_seeded_choice_is_repeatable_and_a_larger_one_contains_it(tmp_path, model, loaded):
    run(tmp_path, model, num_samples=10, seed=7)
    run(tmp_path, model, num_samples=20, seed=7)
    chosen = [text for extractor in loaded for step in extractor.steps for text in step]
    assert steps(loaded) == [10, 10]
    assert len(set(chosen)) == 20
    assert chosen != sorted(chosen)
    run(tmp_path, model, num_samples=10, seed=8, output="other")
    assert set(loaded[-1].steps[0]) != set(chosen[:10])


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"layers": [1]}, r"layers: \[0, 2\] there, \[1\] here"),
        ({"mode": "short"}, r'mode: "both" there, "short" here'),
        ({"batch_size": 5}, "batch_size: 10 there, 5 here"),
        ({"overlong": "refuse"}, "overlong"),
        ({"max_seq_length": 16}, "max_seq_length"),
        ({"seed": 1}, "seed: null there, 1 here"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype"),
        ({"texts": ["other", *TEXTS[1:]]}, r"batch_000\.pkl: it holds other texts"),
        ({"texts": TEXTS[:22]}, r"batch_002\.pkl: it holds 5 texts, and 2 are wanted"),
        ({"texts": TEXTS[:10]}, "it holds 3 batches of short, and this run has 1"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(tmp_path, model, changed, field):
    run(tmp_path, model)
    before = committed_files(tmp_path / "out")
    with pytest.raises(UsageError, match=field):
        run(tmp_path, model, **changed)
    assert committed_files(tmp_path / "out") == before


def test_another_model_is_refused_by_its_digest(tmp_path, model):
    run(tmp_path, model)
    with pytest.raises(UsageError, match=r"model\.digest"):
        run(tmp_path, str(write_model(tmp_path / "other", seed=1)))


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path, model):
    run(tmp_path, model)
    mine = tmp_path / "out/vectors_short/notes.txt"
    mine.write_text("mine")
    run(tmp_path, model, layers=[1], mode="short", texts=TEXTS[:5], overwrite=True)
    left = {"vectors_short/batch_000.pkl", "mean_vector_short.pkl", "metadata.json", "vectors_short/notes.txt"}
    assert set(committed_files(tmp_path / "out")) == left
    (tmp_path / "out/metadata.json").write_text("{}")
    with pytest.raises(UsageError, match="not written by `mean`"):
        run(tmp_path, model, overwrite=True)
    assert mine.read_text() == "mine"


def test_vectors_without_metadata_are_refused(tmp_path, model):
    run(tmp_path, model)
    (tmp_path / "out/metadata.json").unlink()
    with pytest.raises(UsageError, match=r"it holds vectors and no metadata\.json"):
        run(tmp_path, model)


def test_failed_texts_are_set_aside_by_name_and_counted(tmp_path, model):
    texts = [*TEXTS[:12], "fail", *TEXTS[12:]]
    summary = run(tmp_path, model, texts=texts)
    assert (summary.texts, summary.vectors, summary.failed) == (26, 25, 1)
    batch = stored(tmp_path / "out/vectors_long/batch_001.pkl")
    (failed,) = batch["failed"]
    assert (failed["sample_idx"], failed["reason"], len(batch["vectors"])) == (12, "it says so", 9)
    np.testing.assert_allclose(
        stored(tmp_path / "out/mean_vector_short.pkl")["mean"], vectors_of(TEXTS, "short").mean(axis=0), rtol=1e-6
    )
    assert run(tmp_path, model, texts=texts).computed == 0
    with pytest.raises(RunError, match=r"1 texts have failed, more than --max_failed 0; one is sample 12: it says so"):
        run(tmp_path, model, texts=texts, max_failed=0)


def test_without_any_vector_there_is_no_mean(tmp_path, model):
    with pytest.raises(RunError, match="no text has a vector"):
        run(tmp_path, model, texts=["fail"])
    with pytest.raises(UsageError, match="there are no texts"):
        run(tmp_path, model, texts=[], output="none")


def test_one_vector_says_nothing_of_the_error(tmp_path, model):
    run(tmp_path, model, texts=TEXTS[:1])
    assert np.isnan(stored(tmp_path / "out/mean_vector_short.pkl")["standard_error"]).all()


def test_the_output_may_be_any_store(tmp_path, model):
    data = write(tmp_path / "texts.pkl")
    for output in ("memory://means", str(tmp_path / "out")):
        mean(data, model, output, layers=[0], batch_size=10)
    store = open_store("memory://means")
    assert {name: store.read_bytes(name) for name in store.list()} == committed_files(tmp_path / "out")


def test_a_damaged_batch_is_named(tmp_path, model):
    run(tmp_path, model)
    path = tmp_path / "out/vectors_short/batch_001.pkl"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RunError, match=r"vectors_short/batch_001\.pkl: damaged .*: delete it"):
        run(tmp_path, model)


def test_layers_must_be_named_for_other_models_than_pythia(tmp_path, model):
    with pytest.raises(UsageError, match=r"--layers: name the layers of .*, from 0 to 2"):
        run(tmp_path, model, layers=None)
    with pytest.raises(UsageError, match=r"--layers 3: .* has layers 0 to 2"):
        run(tmp_path, model, layers=[3])
