"""`acts.parts`: references to committed files that hold every stored sample once, in every format."""

import gzip
import json
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import RunError, UsageError
from core.reading import ShardPart, open_activations, shard_part
from core.reading.files import OPENERS
from core.reading.files.whole_rows import WholeRows
from core.shards.formats import FORMATS as FORMAT_READERS
from core.shards.formats import planes_shard

WINDOWS = [[5, 1, 9], [3, 30, 2], [8]]
SITES = {"mlp": ((0, 2), 8), "residual": ((0, 2, 4), 6)}
FORMATS = {"pickle": True, "safetensors": False, "planes": False, "npz": False, "parquet": False, "arrow": False}
NO_BFLOAT16 = ("npz", "parquet", "arrow")


def written(out: Path, shard_format: str, **more) -> Path:
    more = {"dtype": "float16"} | more if shard_format in NO_BFLOAT16 else more
    run = SyntheticRun(SITES, shard_format=shard_format, gzipped=FORMATS[shard_format], **more)
    write_run(out, run, WINDOWS)
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """The same random values in each format, of a selection that leaves out a third of the tokens."""
    runs = {name: written(tmp_path_factory.mktemp(name), name, dropped=0.3) for name in FORMATS}
    return runs | {"float16": written(tmp_path_factory.mktemp("f"), "safetensors", dropped=0.3, dtype="float16")}


def tensors_of(out: Path, site: str) -> list[dict[str, np.ndarray]]:
    """The tensors of each safetensors shard, read by the package."""
    return [load_file(path) for path in sorted(out.glob(f"tpu_0/{site}/shard_*.safetensors"))]


@pytest.mark.parametrize("shard_format", FORMATS)
@pytest.mark.parametrize("site", SITES)
def test_a_part_holds_what_the_safetensors_package_reads(runs, shard_format, site):
    wanted = tensors_of(runs["float16" if shard_format in NO_BFLOAT16 else "safetensors"], site)
    parts = open_activations(str(runs[shard_format])).parts
    assert [(part.window, part.n_samples) for part in parts] == [(1, 3), (2, 3), (3, 1)]
    for part, tensors in zip(parts, wanted, strict=True):
        rows = part.read(site)
        assert rows.layers == SITES[site][0]
        assert part.n_tokens == part.n_rows == rows.n_rows == len(tensors["token_ids"])
        np.testing.assert_array_equal(rows.offsets, tensors["sample_offsets"])
        np.testing.assert_array_equal(rows.sample_idx, tensors["sample_idx"])
        np.testing.assert_array_equal(rows.token_ids(), tensors["token_ids"])
        np.testing.assert_array_equal(rows.positions(), tensors["positions"])
        for layer in rows.layers:
            exact = tensors[f"layer_{layer}"]
            assert exact.dtype == (np.float16 if shard_format in NO_BFLOAT16 else ml_dtypes.bfloat16)
            np.testing.assert_array_equal(rows.stored(layer)["activation"], exact)
            np.testing.assert_array_equal(rows.rows(layer, 1, 3), exact[1:3].astype(np.float32))


def test_a_part_of_a_pickle_holds_what_gzip_and_pickle_read(runs):
    for number, part in enumerate(open_activations(str(runs["pickle"])).parts, 1):
        path = runs["pickle"] / f"tpu_0/residual/shard_{number:04d}.pkl.gz"
        shard = pickle.loads(gzip.decompress(path.read_bytes()))
        rows = part.read("residual", 2)
        wanted = np.concatenate([item["activation"] for item in shard[2]])
        np.testing.assert_array_equal(rows.stored(2)["activation"], wanted)
        np.testing.assert_array_equal(rows.positions(), np.concatenate([i["token_positions"] for i in shard[2]]))


@pytest.mark.parametrize("shard_format", FORMATS)
def test_a_part_has_the_rows_of_its_sample_table(runs, shard_format):
    out = runs[shard_format]
    for number, part in enumerate(open_activations(str(out)).parts, 1):
        lines = gzip.decompress((out / f"tpu_0/samples_{number:04d}.jsonl.gz").read_bytes()).splitlines()
        for row, line in zip(part.read("mlp").samples, map(json.loads, lines), strict=True):
            assert row.sample_idx == line["sample_idx"]
            assert row.token_ids.tolist() == line["token_ids"]
            assert row.labels == line["labels"] == {"parity": row.sample_idx % 2}
            assert row.text_preview == line["text_preview"]
            assert len(row.positions) == line["n_tokens"]


@pytest.mark.parametrize("shard_format", FORMATS)
def test_parts_without_a_selection_have_all_positions(tmp_path, shard_format):
    for part, lengths in zip(open_activations(str(written(tmp_path, shard_format))).parts, WINDOWS, strict=True):
        rows = part.read("mlp")
        np.testing.assert_array_equal(rows.positions(), np.concatenate([np.arange(n) for n in lengths]))
        np.testing.assert_array_equal(rows.sample_of_rows(), np.repeat(np.arange(len(lengths)), lengths))
        np.testing.assert_array_equal(
            rows.token_ids(2, 4), np.concatenate([row.token_ids for row in rows.samples])[2:4]
        )


def test_a_part_is_small_and_reads_after_pickling(runs):
    part = open_activations(str(runs["planes"])).parts[1]
    sent = pickle.dumps(part)
    assert len(sent) < 4000
    again = pickle.loads(sent)
    assert isinstance(again, ShardPart)
    assert (again, hash(again)) == (part, hash(part))
    np.testing.assert_array_equal(again.read("mlp").rows(2), part.read("mlp").rows(2))


@pytest.mark.parametrize("shard_format", FORMATS)
def test_spans_cut_all_rows(runs, shard_format):
    for part in open_activations(str(runs[shard_format])).parts:
        rows = part.read("residual", 4)
        pieces = [rows.rows(4, *span) for span in rows.spans(max_bytes=4 * 12)]
        assert len(pieces) == (1 if shard_format == "planes" else -(-rows.n_rows // 4))
        np.testing.assert_array_equal(np.concatenate(pieces), rows.rows(4))


def test_a_layer_is_read_without_the_others(runs, tmp_path):
    """Every byte of the other layers of a copy is overwritten: what is asked for is still read."""
    import shutil

    out = shutil.copytree(runs["safetensors"], tmp_path / "copy")
    path = out / "tpu_0/residual/shard_0001.safetensors"
    with safe_open(path, framework="numpy") as shard:
        wanted = shard.get_tensor("layer_4")
    data = bytearray(path.read_bytes())
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    for layer in (0, 2):
        start, stop = header[f"layer_{layer}"]["data_offsets"]
        data[8 + size + start : 8 + size + stop] = b"\xff" * (stop - start)
    path.write_bytes(data)
    (out / "tpu_0/mlp/shard_0001.safetensors").unlink()
    np.testing.assert_array_equal(
        open_activations(str(out)).parts[0].read("residual", 4).stored(4)["activation"], wanted
    )


def test_what_is_not_stored_is_refused_in_one_line(runs):
    part = open_activations(str(runs["planes"])).parts[0]
    for arguments, message in (
        ((), "several sites are stored: choose one of mlp, residual"),
        (("attn",), "site 'attn' is not stored: choose one of mlp, residual"),
        (("mlp", 4), "layer 4 of mlp is not stored: choose from 0, 2"),
        (("mlp", []), "no layer of mlp is asked for"),
    ):
        with pytest.raises(UsageError, match=message):
            part.read(*arguments)


@pytest.mark.parametrize("shard_format", ["parquet", "arrow"])
def test_rows_of_a_table_are_read_across_its_groups(tmp_path, monkeypatch, shard_format):
    monkeypatch.setattr("core.shards.formats.arrow_table.GROUP_BYTES", 300)  # a row of residual takes 36
    (part, *_) = open_activations(str(written(tmp_path / "one", shard_format))).parts
    (wanted, *_) = open_activations(str(written(tmp_path / "other", "safetensors", dtype="float16"))).parts
    rows, exact = part.read("residual"), wanted.read("residual")
    for layer in (4, 0):
        for start, stop in ((0, 15), (3, 7), (5, 6), (6, 15), (0, 5), (15, 15), (4, 4)):
            np.testing.assert_array_equal(rows.rows(layer, start, stop), exact.rows(layer, start, stop))
            np.testing.assert_array_equal(rows.token_ids(start, stop), exact.token_ids(start, stop))


@pytest.mark.parametrize("shard_format", [name for name in FORMATS if name not in ("pickle", "planes")])
def test_windows_in_parts_are_parts_in_order(tmp_path, shard_format):
    out = written(tmp_path, shard_format, n_parts=2)
    parts = open_activations(str(out)).parts
    assert [(part.window, part.part) for part in parts] == [(1, 0), (1, 1), (2, 0), (2, 1), (3, 1)]
    assert [index for part in parts for index in part.read("mlp").sample_idx] == list(range(7))


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UsageError, match="no run here"):
        open_activations(str(tmp_path))
    assert issubclass(UsageError, RunError)


@pytest.mark.parametrize("shard_format", ["safetensors", "planes"])
def test_a_format_without_a_reader_of_rows_is_read_whole(runs, monkeypatch, shard_format):
    part = open_activations(str(runs[shard_format])).parts[1]
    by_rows = part.read("mlp")
    monkeypatch.delitem(OPENERS, shard_format)
    whole = part.read("mlp")
    assert isinstance(whole._file, WholeRows)
    for name in ("rows", "stored"):
        np.testing.assert_equal(getattr(whole, name)(2, 1, 20), getattr(by_rows, name)(2, 1, 20))
    for ours, wanted in zip(
        whole.token_index([(0, 9), (11, 20)]), by_rows.token_index([(0, 9), (11, 20)]), strict=True
    ):
        np.testing.assert_array_equal(ours, wanted)


def test_rows_of_several_blocks_of_a_planes_file_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr(planes_shard, "BLOCK_BYTES", 5 * 8 * 2)
    monkeypatch.setattr(shard_part, "BLOCK_BYTES", 5 * 8 * 2)
    rows = open_activations(str(written(tmp_path, "planes"))).parts[1].read("mlp", 2)
    with (tmp_path / "tpu_0/mlp/shard_0002.planes").open("rb") as file:
        wanted = np.concatenate(FORMAT_READERS["planes"].read(file).layers[2])
    assert list(rows.spans(1)) == [(start, start + 5) for start in range(0, 35, 5)]
    for start in range(35):
        for stop in range(start, 36):
            np.testing.assert_array_equal(rows.stored(2, start, stop)["activation"], wanted[start:stop])
    acts = open_activations(str(tmp_path))
    for shuffle in (False, True):
        batches = list(acts.tokens(2, "mlp", batch_size=9, shuffle=shuffle, chunk_bytes=1))
        found = {
            (s, p): row for b in batches for s, p, row in zip(b.sample_idx, b.positions, b.activations, strict=True)
        }
        assert len(found) == acts.n_tokens
        np.testing.assert_array_equal(
            np.stack([found[4, place] for place in range(30)]), wanted[3:33].astype(np.float32)
        )


@pytest.mark.parametrize("shard_format", ["npz", "parquet", "arrow"])
def test_ranges_of_a_remote_file_are_read_without_the_rest(tmp_path, shard_format):
    fsspec = pytest.importorskip("fsspec")
    out = written(tmp_path / "run", shard_format)
    memory = fsspec.filesystem("memory")
    memory.put(str(out), f"/{shard_format}_run", recursive=True)
    parts, local = open_activations(f"memory://{shard_format}_run").parts, open_activations(str(out)).parts
    for part, same in zip(parts, local, strict=True):
        for site, layer in (("residual", 4), ("mlp", 0)):
            rows, wanted = part.read(site, layer), same.read(site, layer)
            np.testing.assert_array_equal(rows.rows(layer, 1, 5), wanted.rows(layer, 1, 5))
            np.testing.assert_array_equal(rows.token_ids(), wanted.token_ids())
