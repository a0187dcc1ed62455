"""Exports, loaded by the packages that they are for (`make test-interop`); layouts alone: tests/analysis/exporting."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "analysis/exporting"))
from exported_run import LAYER, WIDTH, contexts, make_run, rows_as_set, samples_of

from analyze_activations import export

HOOK = f"blocks.{LAYER}.hook_resid_post"
COLUMN = f"residual_layer_{LAYER}"
SMALL = {"file_mb": 0.0002, "site": "residual", "layer": LAYER}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def samples(run):
    return samples_of(run)


def check_rows(found, wanted):
    assert found["lengths"].tolist() == [len(values) for values, _ in wanted]
    np.testing.assert_array_equal(found["values"], np.concatenate([values for values, _ in wanted]))
    np.testing.assert_array_equal(found["token_ids"], np.concatenate([ids for _, ids in wanted]))


@pytest.mark.parametrize(("to", "kind"), [("parquet", "folder"), ("arrow", "saved")])
@pytest.mark.parametrize("size", [None, 4])
def test_datasets_3_loads_exports(run, samples, tmp_path, read_with, to, kind, size):
    export(run, to, output=tmp_path / "out", context_size=size, **SMALL)
    found = read_with("datasets3", "datasets_rows", kind, tmp_path / "out", COLUMN)
    assert str(found["version"]).startswith("3.")
    check_rows(found, contexts(samples, size or 99, keeps_short=True))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_datasets_3_loads_shards(samples, tmp_path, read_with, kind):
    shards = make_run(tmp_path / "run", shard_format=kind)
    found = read_with("datasets3", "datasets_rows", kind, f"{shards}/tpu_0/residual/*.{kind}", COLUMN)
    check_rows(found, contexts(samples, 99, keeps_short=True))


@pytest.mark.parametrize("size", [None, 4])
def test_datasets_3_loads_cached_activations(run, samples, tmp_path, read_with, size):
    export(run, "sae_lens", output=tmp_path / "out", context_size=size, **SMALL)
    found = read_with("datasets3", "datasets_rows", "saved", tmp_path / "out", HOOK)
    wanted = contexts(samples, size or 1, keeps_short=False)
    assert rows_as_set(found["values"]) == rows_as_set(np.concatenate([values for values, _ in wanted]))


@pytest.mark.parametrize("size", [None, 4])
def test_sae_lens_draws_its_batches_from_an_export(run, samples, tmp_path, read_with, size):
    export(run, "sae_lens", output=tmp_path / "out", context_size=size, **SMALL)
    found = read_with("sae_lens", "sae_lens_batches", tmp_path / "out", HOOK, size or 1, WIDTH)
    wanted = {row.astype(np.float32).tobytes() for sample in samples for row in sample.values}
    rows = [row.tobytes() for row in found["values"]]
    assert len(rows) == 24
    assert set(rows) <= wanted


@pytest.mark.parametrize("size", [None, 4])
def test_llamascopium_loads_every_row_in_order(run, samples, tmp_path, read_with, size):
    export(run, "llamascopium", output=tmp_path / "out", context_size=size, **SMALL)
    found = read_with("llamascopium", "llamascopium_batches", tmp_path / "out", HOOK)
    n_rows = len(found["values"])
    wanted = np.concatenate([sample.values for sample in samples]).astype(np.float32)
    assert n_rows > len(wanted) - 4
    np.testing.assert_array_equal(found["values"], wanted[:n_rows])
    np.testing.assert_array_equal(found["tokens"], np.concatenate([s.token_ids for s in samples])[:n_rows])


@pytest.mark.parametrize(
    ("environment", "line"),
    [("sae_lens", "from sae_lens.config import"), ("dictionary_learning", "from dictionary_learning.training import")],
)
def test_trainers_take_batches_as_the_page_says(tmp_path, read_with, environment, line):
    make_run(tmp_path / "activations", dtype="bfloat16")
    found = read_with(environment, "run_snippet", tmp_path, LAYER, line)
    assert sorted(found["decoder"].shape) == [WIDTH, 16 * WIDTH]
    assert np.isfinite(found["decoder"]).all()
    assert found["taken"] > 1  # epochs of 57 tokens
