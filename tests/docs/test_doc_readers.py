"""The readers shown on the pages read what runs store, without this project."""

import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from doc_snippets import snippet
from tiny_run import D_MODEL, stream_config, token_lines, write_model

from core.run.config import RunConfig
from core.run.runner import run

LAYER, SAMPLE = 2, 3
"""The layer and sample that the snippets read."""
N_SAMPLES = 6
FIRST_LINE = {"pickle": "with gzip.open", "safetensors": "def tensor", "planes": 'shard = np.load("tpu_0'}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RunConfig:
    """The run of all tokens in float32."""
    home = tmp_path_factory.mktemp("whole")
    config = stream_config(
        home,
        write_model(home / "model"),
        token_lines(N_SAMPLES, seed=1),
        layers_to_extract=(0, LAYER),
        dtype="float32",
    )
    run(config)
    return config


@pytest.fixture(scope="module")
def exact(whole) -> np.ndarray:
    """The activations that the snippets read."""
    path = Path(whole.output_dir) / "tpu_0/shard_0001.pkl.gz"
    return pickle.loads(gzip.decompress(path.read_bytes()))[LAYER][SAMPLE]["activation"]


def run_in(folder: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch, **flags) -> None:
    """Runs into `folder` and changes to it, as a reader who tries the snippets would."""
    run(replace(config, output_dir=str(folder), dtype="float16", **flags))
    monkeypatch.chdir(folder)


def planes_reader() -> str:
    """The reader of the format's page, with a layer of this small model."""
    return snippet("output_format.md", with_line="def read(").replace("layer=14", f"layer={LAYER}")


@pytest.mark.parametrize("fmt", FIRST_LINE)
@pytest.mark.parametrize(("kind", "block", "error"), [("int8", 5, 0.5 / 127), ("fp8", None, 1 / 16)])
def test_codes_are_read_as_the_page_says(whole, exact, tmp_path, monkeypatch, fmt, kind, block, error):
    run_in(tmp_path, whole, monkeypatch, quantize=kind, quantize_block=block, format=fmt)
    names: dict = {}
    exec(snippet("reductions.md", with_line="def restored("), names)
    if fmt == "planes":
        exec(planes_reader(), names)
    exec(snippet("reductions.md", with_line=FIRST_LINE[fmt]), names)
    found = names["x"]
    assert (found.shape, found.dtype) == (exact.shape, np.float32)
    assert "core." not in "".join(map(str, names.values()))
    size = block or D_MODEL
    largest = np.maximum.reduceat(np.abs(exact), range(0, D_MODEL, size), axis=1)
    bound = 1.01 * error * largest.repeat(size, axis=1)[:, :D_MODEL]
    assert (np.abs(found - exact) <= bound).all()


def test_the_largest_values_are_spread_as_the_page_says(whole, exact, tmp_path, monkeypatch):
    run_in(tmp_path, whole, monkeypatch, quantize="int8", quantize_block=3, topk=7)
    names: dict = {}
    for line in ("def restored(", FIRST_LINE["pickle"], "def spread("):
        exec(snippet("reductions.md", with_line=line), names)
    largest = -np.sort(-np.abs(exact), axis=1)[:, :7]
    np.testing.assert_allclose(-np.sort(-np.abs(names["x"]), axis=1)[:, :7], largest, rtol=0.02, atol=0.01)
    stored = names["x"] != 0
    np.testing.assert_allclose(names["x"][stored], exact[stored], atol=np.abs(exact).max() / 200)


def test_npz_is_read_as_the_page_says(whole, exact, tmp_path, monkeypatch):
    run_in(tmp_path, whole, monkeypatch, format="npz")
    names: dict = {}
    exec(snippet("output_format.md", with_line='shard = np.load("tpu_0/shard_0001.npz"').replace("_14", "_2"), names)
    np.testing.assert_array_equal(names["activation"], exact.astype(np.float16))


@pytest.mark.parametrize("fmt", ["parquet", "arrow"])
def test_tables_are_read_by_datasets_as_the_page_says(whole, exact, tmp_path, monkeypatch, fmt):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    run_in(tmp_path, whole, monkeypatch, format=fmt)
    names: dict = {}
    code = snippet("output_format.md", with_line='rows = load_dataset("parquet"').replace("_14", "_2")
    exec(code.replace('"parquet"', f'"{fmt}"').replace(".parquet", f".{fmt}"), names)
    np.testing.assert_array_equal(names["activation"], exact.astype(np.float16))


def test_planes_are_read_as_the_page_says_where_samples_are_empty(whole, tmp_path, monkeypatch):
    run_in(tmp_path, whole, monkeypatch, pool=("last",), positions=("100:",), format="planes")
    names: dict = {}
    exec(planes_reader(), names)
    shard = np.load("tpu_0/shard_0001.planes")
    shapes = [names["read"](shard, LAYER, sample).shape for sample in range(N_SAMPLES)]
    lengths = [len(line["input_ids"]) for line in token_lines(N_SAMPLES, seed=1)]
    assert shapes == [(int(length > 100), D_MODEL) for length in lengths]
    assert shapes[0][0] == 0  # nothing stands before it
    assert set(shard.files) == {
        "shard.json",
        "sample_offsets",
        "sample_idx",
        "layer_0/000000.zst",
        "layer_2/000000.zst",
    }


def test_planes_name_the_arrays_that_codes_have_besides(whole, tmp_path, monkeypatch):
    run_in(tmp_path, whole, monkeypatch, quantize="int8", topk=4, format="planes")
    shard = np.load("tpu_0/shard_0001.planes")
    header = json.loads(shard["shard.json"])
    assert header["more"] == ["indices", "scale"]
    assert (shard["layer_2/indices"].shape, shard["layer_2/scale"].shape) == (
        (header["tokens"], 4),
        (header["tokens"], 1),
    )
