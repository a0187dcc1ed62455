"""Exports continue where they were interrupted, to the same bytes, whatever ran their files in which order."""

import itertools
import pickle
from itertools import islice

import numpy as np
import pytest
from exported_run import LAYER, files_of, make_run
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.exporting import export, export_file
from analysis.exporting.items.order import blocks_in_order, cut_blocks, shuffled_blocks
from core.base.errors import RunError, UsageError
from core.shards.formats import FORMATS

SMALL = {"file_mb": 0.0002, "site": "residual", "layer": LAYER}
TARGETS = ("npz", "parquet", "arrow", "safetensors", "sae_lens", "llamascopium", "activault")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    return str(make_run(tmp_path_factory.mktemp("run")))


def stops_after(n_files):
    """Runs so many files, then fails as a process that is killed would."""

    def run(tasks):
        yield from map(export_file, islice(tasks, n_files))
        raise KeyboardInterrupt

    return run


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("n_files", [0, 1, 2])
def test_an_interrupted_export_finishes_to_the_same_bytes(run, tmp_path, to, n_files):
    options = SMALL | {"context_size": 4}
    whole = export(run, to, output=str(tmp_path / "whole"), **options)
    assert whole.files > 2
    with pytest.raises(KeyboardInterrupt):
        export(run, to, output=str(tmp_path / "again"), run=stops_after(n_files), **options)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "again").rglob("*") if path.suffix != ".json"}
    written = []

    def counted(tasks):
        for task in tasks:
            written.append(task.number)
            yield export_file(task)

    report = export(run, to, output=str(tmp_path / "again"), run=counted, **options)
    assert (report.n_kept, report.files) == (n_files, whole.files)
    assert written == list(range(n_files, whole.files))
    assert files_of(tmp_path / "again") == files_of(tmp_path / "whole")
    kept = [path for path in before if path.is_file()]
    assert len(kept) == n_files
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)


def test_a_file_without_its_record_is_written_again_and_found_to_be_the_same(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        export(run, "npz", output=str(tmp_path), run=stops_after(2), **SMALL | {"file_mb": 0.001})
    (tmp_path / ".export-00001.json").unlink()
    assert export(run, "npz", output=str(tmp_path), **SMALL | {"file_mb": 0.001}).n_kept == 1


def test_a_file_of_somebody_else_is_not_replaced(run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        export(run, "npz", output=str(tmp_path), run=stops_after(1), **SMALL | {"file_mb": 0.001})
    (tmp_path / "chunks/chunk_0001.npz").write_bytes(b"mine")
    with pytest.raises(RunError, match=r"chunk_0001.npz exists with other content"):
        export(run, "npz", output=str(tmp_path), **SMALL | {"file_mb": 0.001})


def test_tasks_run_anywhere_in_any_order(run, tmp_path):
    def elsewhere(tasks):
        return map(export_file, reversed([pickle.loads(pickle.dumps(task)) for task in tasks]))

    export(run, "sae_lens", output=str(tmp_path / "one"), **SMALL)
    export(run, "sae_lens", output=str(tmp_path / "other"), run=elsewhere, **SMALL)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "other")


@pytest.mark.parametrize("shard_format", [name for name in FORMATS if name != "safetensors"])
def test_every_shard_format_exports_the_same(run, tmp_path, shard_format):
    source = make_run(tmp_path / "run", shard_format=shard_format)
    for to in ("llamascopium", "safetensors"):
        export(str(source), to, output=str(tmp_path / f"{to}_one"), drop=["first", "-1:"], **SMALL)
        export(run, to, output=str(tmp_path / f"{to}_other"), drop=["first", "-1:"], **SMALL)
    one, other = (files_of(tmp_path / f"llamascopium_{name}") for name in ("one", "other"))
    del one["export.json"], other["export.json"]
    assert one == other


def test_a_finished_export_is_left_as_it_is(run, tmp_path):
    first = export(run, "npz", output=str(tmp_path), **SMALL)
    before = files_of(tmp_path)
    again = export(run, "npz", output=str(tmp_path), **SMALL)
    assert again.n_kept == first.files
    assert files_of(tmp_path) == before
    assert not any(name.startswith(".") for name in before)


def test_another_folder_or_export_is_refused(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no export"):
        export(run, "npz", output=str(tmp_path), **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    export(run, "sae_lens", output=str(tmp_path / "out"), **SMALL)
    with pytest.raises(UsageError, match=r"holds another export \(.*request.seed: 0 there, 1 here"):
        export(run, "sae_lens", output=str(tmp_path / "out"), seed=1, **SMALL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"to": "csv"}, "'csv' is no format to export to: choose from npz, parquet"),
        ({"layer": 7}, "layer 7 of residual is not stored"),
        ({"site": None}, "several sites are stored: choose one of mlp, residual"),
        ({"context_size": 31}, "nothing is left to export: 0 tokens are dropped, and no sample has 31 left"),
        ({"drop": "bos"}, "needs tokenizer"),
        ({"context_size": 0}, "a context of 0 tokens: expected 1 or more"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(run, tmp_path, change, said):
    options = {"to": "sae_lens", **SMALL} | change
    with pytest.raises(UsageError, match=said):
        export(run, output=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(any)


@settings(max_examples=200, deadline=None)
@given(counts=COUNTS, size=st.integers(1, 4), seed=st.integers(0, 9), per_file=st.integers(1, 9))
def test_files_have_every_item_once_and_as_many_as_they_should(counts, size, seed, per_file):
    total = sum(counts)
    ends = [*range(per_file, total, per_file), total]
    wanted = [(part, item) for part, count in enumerate(counts) for item in range(count)]
    for blocks in (blocks_in_order(counts), shuffled_blocks(counts, size, seed)):
        files = [
            [(part, item) for part, first, last in file for item in range(first, last)]
            for file in cut_blocks(blocks, ends)
        ]
        assert [len(file) for file in files] == np.diff([0, *ends]).tolist()
        items = list(itertools.chain(*files))
        assert sorted(items) == wanted
        if blocks == blocks_in_order(counts):
            assert items == wanted
