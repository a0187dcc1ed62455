"""Whitening of committed shards: beside numpy in float64 over what gzip and pickle read."""

import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.stats import PassOptions, StatsRequest, drop_rules, stats
from analysis.whitened import ApplyRequest, LayerRequest, whiten_apply, whiten_check, whiten_fit
from analysis.whitened.apply_pass import ApplyPass
from analysis.whitening import IncrementalWhitener, WhiteningSettings, load_whitening
from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import RunError, UsageError

WINDOWS = [[5, 1, 9], [3, 30, 2], [8, 8], [40], [2, 2, 2]]
WIDTH = 6
NOWHERE = PassOptions(partials="none")
ZCA = WhiteningSettings("zca")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    sites = {"mlp": ((0, 2), WIDTH)}
    write_run(folder, SyntheticRun(sites, shard_format="pickle", dtype="float16", gzipped=True, dropped=0.2), WINDOWS)
    return folder


@pytest.fixture(scope="module")
def request_(out) -> LayerRequest:
    return LayerRequest(str(out), layer=2, drop=drop_rules(None))


@pytest.fixture(scope="module")
def fitted(request_, tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("whitening") / "w.safetensors")
    whiten_fit(request_, ZCA, NOWHERE, path)
    return path


def items_of(out: Path) -> list[dict]:
    """The samples of layer 2 as gzip and pickle read them."""
    shards = [pickle.loads(gzip.decompress(path.read_bytes())) for path in sorted(out.rglob("shard_*.pkl.gz"))]
    return [item for shard in shards for item in shard[2]]


def rows_of(item: dict) -> tuple[np.ndarray, np.ndarray]:
    """Positions and rows of a sample, without position 0, in float64."""
    kept = np.asarray(item["token_positions"]) > 0
    return np.asarray(item["token_positions"])[kept], np.asarray(item["activation"], np.float64)[kept]


def zca_of(rows: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    return vectors / np.sqrt(values) @ vectors.T


def test_the_matrix_is_that_of_numpy(out, fitted):
    rows = np.concatenate([rows_of(item)[1] for item in items_of(out)])
    whitening = load_whitening(fitted)
    assert whitening.n_samples == len(rows)
    np.testing.assert_allclose(whitening.mean, rows.mean(axis=0), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(whitening.transform, zca_of(rows), rtol=1e-8, atol=1e-9)


def test_fitting_from_statistics_or_with_workers_gives_the_same_file(out, request_, fitted, tmp_path):
    stats(str(out), StatsRequest(drop=request_.drop), NOWHERE, str(tmp_path / "stats.npz"))
    from_stats = replace(request_, stats=str(tmp_path / "stats.npz"))
    for name, request, options in (("s", from_stats, NOWHERE), ("t", request_, PassOptions("threads", 2))):
        whiten_fit(request, ZCA, options, str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == Path(fitted).read_bytes()
    assert not (out / "analysis").exists()


def test_fitting_from_a_saved_incremental_whitener(out, request_, fitted, tmp_path):
    whitener = IncrementalWhitener(exclude=[])
    for item in items_of(out):
        whitener.update(rows_of(item)[1])
    whitener.save(str(tmp_path / "saved.safetensors"))
    report = whiten_fit(replace(request_, stats=str(tmp_path / "saved.safetensors")), ZCA, NOWHERE)
    np.testing.assert_allclose(report.whitening.transform, load_whitening(fitted).transform, rtol=1e-8)


def test_what_it_was_fitted_on_is_white_and_other_tokens_are_not(request_, fitted):
    report = whiten_check(request_, fitted, NOWHERE)
    assert report.ok
    assert report.check.max_error < 1e-10
    other = whiten_check(replace(request_, layer=0), fitted, NOWHERE)
    assert not other.ok
    assert "above the tolerance of 1e-05" in other.lines()[0]
    everything = whiten_check(replace(request_, drop=drop_rules("none")), fitted, NOWHERE)
    assert "it was fitted on" in everything.lines()[-1]


def test_where_the_rank_does_not_allow_it_the_check_says_so(tmp_path):
    write_run(tmp_path / "out", SyntheticRun({"mlp": ((0,), 8)}), [[4, 3]])
    request = LayerRequest(str(tmp_path / "out"), drop=drop_rules(None))
    path = str(tmp_path / "w.safetensors")
    report = whiten_fit(request, ZCA, NOWHERE, path)
    assert report.whitening.rank == 4
    check = whiten_check(request, path, NOWHERE)
    assert not check.ok
    assert check.check.kept_error < 1e-6
    assert "rank: 4 of 8 directions vary above the floor (5 tokens allow at most 4)" in check.lines()[1]
    pca = whiten_fit(request, WhiteningSettings("pca"), NOWHERE, str(tmp_path / "pca.safetensors"))
    assert pca.whitening.kept == 4
    assert whiten_check(request, str(tmp_path / "pca.safetensors"), NOWHERE).ok
    whiten_fit(request, WhiteningSettings("zca", "oas"), NOWHERE, str(tmp_path / "oas.safetensors"))
    assert "shrinkage" in whiten_check(request, str(tmp_path / "oas.safetensors"), NOWHERE).lines()[-1]


@pytest.fixture(scope="module")
def applied(request_, fitted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("chunks") / "white"
    whiten_apply(ApplyRequest(request_, fitted, str(folder), chunk_samples=5), PassOptions())
    return folder


def test_chunks_hold_the_whitened_rows_at_their_positions(out, applied, request_):
    items = items_of(out)
    transform = zca_of(np.concatenate([rows_of(item)[1] for item in items]))
    mean = np.concatenate([rows_of(item)[1] for item in items]).mean(axis=0)
    files = sorted(applied.glob("chunks/*"))
    assert [path.name for path in files] == ["chunk_0000.npz", "chunk_0001.npz", "chunk_0002.npz"]
    seen, lengths = 0, [length for window in WINDOWS for length in window]
    for path in files:
        chunk = np.load(path)
        own = lengths[seen : seen + 5]
        assert chunk["activations"].shape == (len(own), max(own), WIDTH)
        assert chunk["activations"].dtype == np.float16
        for place, item in enumerate(items[seen : seen + 5]):
            positions, rows = rows_of(item)
            mask = np.zeros(max(own), bool)
            mask[positions] = True
            np.testing.assert_array_equal(chunk["attention_mask"][place], mask)
            np.testing.assert_allclose(
                chunk["activations"][place][mask], (rows - mean) @ transform, rtol=2e-3, atol=2e-3
            )
            assert not chunk["activations"][place][~mask].any()
            assert chunk["sample_idx"][place] == item["sample_idx"]
            assert (chunk["token_ids"][place] >= 0).sum() == own[place] == chunk["lengths"][place]
        seen += len(own)
    metadata = json.loads((applied / "metadata.json").read_text())
    assert [entry["n_samples"] for entry in metadata["chunks"]] == [5, 5, 2]
    assert (metadata["whitening"]["method"], metadata["layer"], metadata["site"]) == ("zca", 2, "mlp")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_apply_goes_on_with_the_same_bytes(applied, request_, fitted, tmp_path, monkeypatch):
    again = ApplyRequest(request_, fitted, str(tmp_path / "white"), chunk_samples=5)
    with monkeypatch.context() as patch:
        done = ApplyPass.map
        patch.setattr(ApplyPass, "map", lambda own, part: done(own, part) if part.number == 0 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            whiten_apply(again, PassOptions())
    assert len(list(tmp_path.rglob("*.npz"))) == 1
    report = whiten_apply(again, PassOptions("threads", 2))
    assert (report.chunks, report.samples) == (3, 12)
    assert files_of(tmp_path / "white") == files_of(applied)
    with pytest.raises(RunError, match="exists with other content"):
        whiten_apply(replace(again, dtype="float32"), PassOptions())


def test_what_does_not_fit_is_one_line(request_, fitted, tmp_path):
    other = tmp_path / "other"
    write_run(other, SyntheticRun({"mlp": ((2,), 4)}), [[9, 9]])
    wrong = replace(request_, url=str(other))
    with pytest.raises(UsageError, match=r"whitens rows of 6 values: these have 4"):
        whiten_check(wrong, fitted, NOWHERE)
    with pytest.raises(UsageError, match=r"whitens rows of 6 values: those of mlp have 4"):
        whiten_apply(ApplyRequest(wrong, fitted, str(tmp_path / "x")), NOWHERE)
    with pytest.raises(UsageError, match=r"--to parquet: expected one of npz"):
        ApplyRequest(request_, fitted, str(tmp_path / "x"), writer="parquet")
    with pytest.raises(UsageError, match="exists with other content"):
        whiten_fit(request_, WhiteningSettings("pca"), NOWHERE, fitted)
