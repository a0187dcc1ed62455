"""Real runs are read as they stand: reductions, unfinished runs, several folders, other stores, damage."""

import gzip
import json
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_gcs import FakeGcs, gcs_environment
from reading_oracle import assert_exact, exact_rows, keys
from resealing import write_and_reseal
from tiny_run import D_MODEL, stream_config, token_lines, write_model

from benchmarks.storage.synthetic_run import SyntheticRun, write_run
from core.base.errors import RunError, UsageError
from core.object_store import open_store
from core.reading import open_activations
from core.run.runner import run

LINES = [*token_lines(8, seed=5, longest=40), {"input_ids": [7], "part": 0}]
SITES = {"mlp": ((0, 2), 8), "residual": ((0, 2), 6)}
CODED = {"scale": "quantize", "indices": "topk"}
SMALL = {"buffer_bytes": 2000, "chunk_bytes": 40, "open_shards": 2}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A run of a tiny model that stores float32 pickles: the default but for the dtype."""
    home = tmp_path_factory.mktemp("full")
    config = stream_config(
        home, write_model(home / "model", tokenizer=False), LINES, dtype="float32", shard_size_gb=1e-5,
        layers_to_extract=(0, 2), max_seq_length=64,
    )  # fmt: skip
    run(config)
    return config


@pytest.fixture(scope="module")
def exact(full) -> dict[tuple[int, int], np.ndarray]:
    """(layer, sample_idx) → activation, read with gzip and pickle alone."""
    found = {}
    for path in sorted(Path(full.output_dir).glob("tpu_0/shard_*.pkl.gz")):
        for layer, items in pickle.loads(gzip.decompress(path.read_bytes())).items():
            found |= {(layer, item["sample_idx"]): item["activation"] for item in items}
    return found


def test_a_run_says_what_it_is(full, exact):
    acts = open_activations(full.output_dir)
    assert (acts.sites, acts.layers, acts.layers_of("residual")) == (("residual",), (0, 2), (0, 2))
    assert (acts.dtype, acts.width(), len(acts), acts.folders) == ("float32", D_MODEL, len(LINES), ("tpu_0",))
    assert acts.n_tokens == sum(len(line["input_ids"]) for line in LINES)
    assert acts.identity == json.loads((Path(full.output_dir) / "run.json").read_text())
    assert len(acts.parts) > 2


def test_a_sample_is_found_by_its_number(full, exact):
    acts = open_activations(full.output_dir)
    for index in (8, 0, 3):
        sample = acts[index]
        assert (sample.sample_idx, sample.token_ids.tolist()) == (index, LINES[index]["input_ids"])
        assert sample.labels == {"part": LINES[index]["part"]}
        assert sample.positions.tolist() == list(range(len(sample.token_ids)))
        assert (sample.full_length, sample.dropped) == (len(sample.token_ids), {})
        for layer in acts.layers:
            np.testing.assert_array_equal(sample.activation(layer), exact[layer, index])
    with pytest.raises(KeyError, match="sample 9 is not stored in"):
        acts[9]
    with pytest.raises(UsageError, match="several layers of residual are stored: choose from 0, 2"):
        acts[0].activation()


def test_samples_come_in_order_and_also_from_one_folder_and_after_pickling(full, exact):
    acts = open_activations(full.output_dir)
    for again in (acts, open_activations(f"{full.output_dir}/tpu_0"), pickle.loads(pickle.dumps(acts))):
        for index, sample in enumerate(again.samples()):
            np.testing.assert_array_equal(sample.activation(2, "residual"), exact[2, index])
        assert index == len(LINES) - 1


@pytest.mark.parametrize(
    "flags",
    [
        {"quantize": "int8", "format": "pickle"},
        {"quantize": "fp8", "format": "safetensors"},
        {"topk": 5, "format": "planes", "dtype": "bfloat16"},
        {"topk": 5, "quantize": "int8", "quantize_block": 2, "format": "safetensors"},
    ],
)
def test_reduced_rows_are_restored(full, exact, tmp_path, flags):
    dtype = {"dtype": "float16"} if "quantize" in flags else {}
    run(replace(full, output_dir=str(tmp_path / "out"), checkpoint_dir=str(tmp_path / "ck"), **dtype, **flags))
    acts = open_activations(str(tmp_path / "out"))
    width = flags.get("topk", D_MODEL)
    for shuffle in (False, True):
        for batch in acts.tokens(2, batch_size=16, shuffle=shuffle):
            wanted = np.stack([exact[2, s][p] for s, p in zip(batch.sample_idx, batch.positions, strict=True)])
            if "topk" in flags:
                smallest = np.sort(np.abs(wanted))[:, -flags["topk"], None]
                wanted = np.where(np.abs(wanted) >= smallest, wanted, 0)
            peak = np.abs(wanted).max(axis=1, keepdims=True)
            assert (np.abs(batch.activations - wanted) <= peak / (14 if flags.get("quantize") == "fp8" else 120)).all()
            assert batch.activations.shape[1] == D_MODEL == acts.width()
        for batch in acts.tokens(2, batch_size=16, shuffle=shuffle, restore=False):
            assert batch.activations.shape[1] == width
            assert batch.more.keys() == {name for name, flag in CODED.items() if flag in flags}


def test_projected_rows_are_back_in_the_space_of_the_model_where_the_matrix_is_given(full, exact, tmp_path):
    rng = np.random.default_rng(0)
    matrix, mean = (rng.normal(size=size).astype(np.float32) for size in ((2, D_MODEL, 4), (2, D_MODEL)))
    np.savez(tmp_path / "p.npz", matrix=matrix, mean=mean)
    flags = {"project": str(tmp_path / "p.npz"), "format": "safetensors"}
    run(replace(full, output_dir=str(tmp_path / "out"), checkpoint_dir=str(tmp_path / "ck"), **flags))
    acts = open_activations(str(tmp_path / "out"))
    restored = open_activations(str(tmp_path / "out"), projection=str(tmp_path / "p.npz"))
    assert (acts.width(), restored.width()) == (4, D_MODEL)
    for slot, layer in enumerate((0, 2)):
        projected = (exact[layer, 3].astype(np.float64) - mean[slot]) @ matrix[slot]
        np.testing.assert_allclose(acts[3].activation(layer), projected, rtol=1e-4, atol=1e-4)
        # The orthogonal projection on the columns of the matrix, by their QR decomposition.
        columns = np.linalg.qr(matrix[slot].astype(np.float64))[0]
        wanted = (exact[layer, 3] - mean[slot]) @ columns @ columns.T + mean[slot]
        np.testing.assert_allclose(restored[3].activation(layer), wanted, rtol=1e-3, atol=1e-3)
        for batches in (restored.tokens([2, 0], batch_size=50), restored.tokens(layer, batch_size=50, shuffle=True)):
            for batch in batches:
                found = batch.activations if batch.activations.ndim == 2 else batch.activations[:, 1 - slot]
                np.testing.assert_allclose(
                    found[batch.sample_idx == 3], wanted[batch.positions[batch.sample_idx == 3]], rtol=1e-3, atol=1e-3
                )
    np.savez(tmp_path / "other.npz", matrix=matrix + 1, mean=mean)
    with pytest.raises(UsageError, match="not those that the run was projected with"):
        open_activations(str(tmp_path / "out"), projection=str(tmp_path / "other.npz"))


@pytest.mark.parametrize("shard_format", ["pickle", "planes"])
def test_pools_are_rows_without_a_position(full, exact, tmp_path, shard_format):
    flags = {"pool": ("mean", "last"), "format": shard_format, "positions": ("1:",)}
    run(replace(full, output_dir=str(tmp_path / "out"), checkpoint_dir=str(tmp_path / "ck"), **flags))
    acts = open_activations(str(tmp_path / "out"))
    stored = [i for i, line in enumerate(LINES) if len(line["input_ids"]) > 1]
    assert len(stored) < len(LINES) == len(acts), "one sample has no token left"
    for shuffle in (False, True):
        batches = list(acts.tokens(2, batch_size=4, shuffle=shuffle))
        samples = np.concatenate([batch.sample_idx for batch in batches])
        assert sorted(samples.tolist()) == sorted([*stored, *stored])
        assert {*np.concatenate([[*batch.positions, *batch.token_ids] for batch in batches])} == {-1}
    ours = np.concatenate([batch.activations for batch in acts.tokens(2, batch_size=4)])
    tokens = [exact[2, i][1:] for i in stored]
    wanted = np.concatenate([[of_sample.mean(axis=0), of_sample[-1]] for of_sample in tokens])
    np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-4)
    sample = acts[len(LINES) - 1]
    assert (sample.activation(2).shape, len(sample.positions)) == ((0, D_MODEL), 0)
    with pytest.raises(UsageError, match="its rows are pools"):
        acts.tokens(2, batch_size=4, drop="first")


def synthetic(out: Path, shard_format: str = "safetensors", **more) -> Path:
    run = SyntheticRun(SITES, shard_format=shard_format, gzipped=shard_format == "pickle")
    write_run(out, run, [[9, 4], [12], [3, 8]], **more)
    return out


def test_an_unfinished_run_has_the_windows_that_are_committed(tmp_path):
    out = synthetic(tmp_path, is_finished=False)
    exact = exact_rows(out, "mlp", 2)
    (out / "tpu_0/shard_0003.json").unlink()  # its files lie there, but no record names them
    (out / "tpu_0/mlp/.tmp~host~1~2~3~4~shard_0004.safetensors").write_bytes(b"half")
    acts = open_activations(str(out))
    assert (len(acts), acts.n_tokens) == (3, 25)
    batches = list(acts.tokens(2, "mlp", batch_size=4))
    assert_exact(batches, acts.folders, exact)
    assert keys(batches, acts.folders) == list(exact)[:25]
    for number in (1, 2):
        (out / f"tpu_0/shard_000{number}.json").unlink()
    with pytest.raises(UsageError, match="no window with a sample is committed there yet"):
        open_activations(str(out))


def test_samples_of_two_streams_with_one_number_are_told_apart_by_their_folder(tmp_path):
    synthetic(tmp_path, folder="tpu_0")
    synthetic(tmp_path, folder="tpu_1", machine=(0, 1))
    acts = open_activations(str(tmp_path))
    assert len(acts) == 10
    with pytest.raises(KeyError, match=r"sample 3 is stored in tpu_0, tpu_1: choose one, acts\['tpu_0', 3\]"):
        acts[3]
    assert acts["tpu_1", 3].part.folder == "tpu_1"
    with pytest.raises(KeyError, match=r"sample 3 is not stored in .*/tpu_7"):
        acts["tpu_7", 3]


@pytest.mark.parametrize("shard_format", ["pickle", "safetensors", "planes"])
def test_a_bucket_is_read_in_ranges_and_gives_the_same(tmp_path, monkeypatch, shard_format):
    out = synthetic(tmp_path, shard_format)
    local = open_activations(str(out))
    with FakeGcs(["your-bucket"]) as server:
        for name, value in gcs_environment(server).items():
            monkeypatch.setenv(name, value)
        bucket = open_store(f"gs://your-bucket/{shard_format}")
        for path in out.rglob("*.*"):
            bucket.create_bytes(str(path.relative_to(out)), path.read_bytes())
        acts = open_activations(bucket.url)
        for shuffle in (False, True):
            flags = {"batch_size": 7, "shuffle": shuffle, **SMALL}
            for ours, wanted in zip(
                acts.tokens([0, 2], "mlp", **flags), local.tokens([0, 2], "mlp", **flags), strict=True
            ):
                np.testing.assert_array_equal(ours.activations, wanted.activations)
                np.testing.assert_array_equal(ours.token_ids, wanted.token_ids)
        np.testing.assert_array_equal(acts[4].activation(2, "residual"), local[4].activation(2, "residual"))


@pytest.mark.parametrize("shard_format", ["pickle", "safetensors", "planes"])
@pytest.mark.parametrize("what", ["cut off", "changed", "gone", "table"])
def test_damage_is_one_line_that_names_the_file_and_the_command(tmp_path, shard_format, what):
    out = synthetic(tmp_path, shard_format)
    (path,) = out.glob("tpu_0/mlp/shard_0002.*")
    data = path.read_bytes()
    if what == "table":
        path = out / "tpu_0/samples_0002.jsonl.gz"
        path.write_bytes(path.read_bytes()[:-9])
    elif what == "gone":
        path.unlink()
    elif what == "cut off":
        path.write_bytes(data[: len(data) // 2])
    else:
        write_and_reseal(path, data[:8] + b"\0\1\2\3" * 20 + data[88:], out / "tpu_0")
    acts = open_activations(str(out))

    def read() -> None:
        if what != "table":
            list(acts.tokens(0, "mlp", batch_size=4))
        [sample.activation(0, "mlp") for sample in acts.samples()]

    with pytest.raises(RunError) as caught:
        read()
    message = str(caught.value)
    assert f"{path} " in message
    assert f"python analyze_activations.py verify {out}" in message
    assert "\n" not in message


def test_a_shard_of_other_rows_than_its_record_says_is_refused(tmp_path):
    for shard_format in ("pickle", "safetensors", "planes"):
        out = synthetic(tmp_path / shard_format, shard_format)
        one, other = (next(out.glob(f"tpu_0/mlp/shard_000{n}.*")) for n in (1, 2))
        write_and_reseal(other, one.read_bytes(), out / "tpu_0")
        with pytest.raises(RunError, match="its record says"):
            list(open_activations(str(out)).tokens(0, "mlp", batch_size=4))


def test_a_record_that_was_changed_or_belongs_to_another_run_is_refused(tmp_path):
    out = synthetic(tmp_path / "a")
    record = out / "tpu_0/shard_0002.json"
    other = tmp_path / "b"
    write_run(other, SyntheticRun(SITES, seed=1), [[9, 4], [12], [3, 8]])
    shutil.copy(other / "tpu_0/shard_0002.json", record)
    with pytest.raises(RunError, match=r"shard_0002.json cannot be read: it was written by another run"):
        open_activations(str(out))
    record.write_bytes(record.read_bytes().replace(b"12", b"13"))
    with pytest.raises(RunError, match=r"shard_0002.json"):
        open_activations(str(out))
    record.unlink()
    with pytest.raises(RunError, match="window 2 has no commit record but later ones have"):
        open_activations(str(out))


def test_a_pickle_from_elsewhere_runs_nothing(tmp_path):
    out = synthetic(tmp_path, "pickle")
    (path,) = out.glob("tpu_0/mlp/shard_0002.*")

    class Harmful:
        def __reduce__(self):
            return print, ("it ran",)

    write_and_reseal(path, gzip.compress(pickle.dumps({0: [Harmful()]})), out / "tpu_0")
    with pytest.raises(RunError, match="neither an array nor a plain container"):
        list(open_activations(str(out)).tokens(0, "mlp", batch_size=4))


def test_one_changed_byte_of_a_block_is_found_by_its_crc(tmp_path):
    out = synthetic(tmp_path, "planes")
    path = out / "tpu_0/mlp/shard_0002.planes"
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("layer_2/000000.zst")
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + len(member.filename) + member.file_size - 3] ^= 1
    path.write_bytes(data)
    acts = open_activations(str(out))
    assert sum(len(batch) for batch in acts.tokens(0, "mlp", batch_size=4)) == acts.n_tokens
    with pytest.raises(RunError, match=r"shard_0002.planes cannot be read: layer_2/000000.zst was damaged"):
        list(acts.tokens(2, "mlp", batch_size=4))


@pytest.mark.parametrize("shard_format", ["pickle", "safetensors", "planes"])
def test_a_file_of_another_size_than_its_record_says_is_refused(tmp_path, shard_format):
    out = synthetic(tmp_path, shard_format)
    (path,) = out.glob("tpu_0/mlp/shard_0002.*")
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RunError, match=r"bytes where .* were written"):
        list(open_activations(str(out)).tokens(2, "mlp", batch_size=4))


@pytest.mark.parametrize("shard_format", ["pickle", "safetensors", "planes"])
def test_changed_bytes_that_a_record_agrees_with_are_read_or_refused_in_one_line(tmp_path, shard_format):
    out = synthetic(tmp_path, shard_format)
    (path,) = out.glob("tpu_0/mlp/shard_0002.*")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    ends = [*range(min(700, len(whole))), *range(max(0, len(whole) - 700), len(whole))]
    for place in rng.choice(ends, 40).tolist():
        data = bytearray(whole)
        data[place] = rng.integers(256)
        write_and_reseal(path, bytes(data), out / "tpu_0")
        message = ""
        try:
            assert sum(len(batch) for batch in open_activations(str(out)).tokens([0, 2], "mlp", batch_size=9)) > 0
        except RunError as error:
            message = str(error)
        assert message == "" or (str(path) in message and "\n" not in message)
