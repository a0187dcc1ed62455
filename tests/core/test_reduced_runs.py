"""A run that stores reduced activations, against float64 arithmetic on a run that stores all of them in float32."""

import gzip
import itertools
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_run import D_MODEL, cache_dir, token_lines, write_jsonl, write_model

from analysis.verification import verify
from core.run_config import RunConfig
from core.runner import run

SITES, LAYERS = ("k", "residual"), (0, 2)
LINES = [*token_lines(20, seed=5), {"input_ids": [7], "part": 0}]
POOLS = ("mean", "first", "last", "max", "exp:0.067", "exp:0.5")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> RunConfig:
    """The run of everything in float32, packed; `out_False` beside it is the same with one sample a row."""
    home = tmp_path_factory.mktemp("full")
    config = RunConfig(
        model_path=str(write_model(home / "model")),
        dataset_path=str(write_jsonl(home / "s.jsonl", LINES)),
        output_dir=str(home / "out"),
        checkpoint_dir=str(home / "ck"),
        compilation_cache_dir=cache_dir(),
        max_seq_length=256,
        activation_type=SITES,
        layers_to_extract=LAYERS,
        dtype="float32",
    )
    run(config)
    return config


def items(out: str | Path) -> dict[tuple[str, int, int], dict]:
    """(site, layer, sample_idx) → the stored dict, read with gzip and pickle alone."""
    found = {}
    for path in sorted(Path(out).glob("tpu_0/**/shard_*.pkl.gz")):
        for layer, samples in pickle.loads(gzip.decompress(path.read_bytes())).items():
            site = path.parent.name if path.parent.name in SITES else "residual"
            found |= {(site, layer, item["sample_idx"]): item for item in samples}
    return found


def exact(full: RunConfig) -> dict[tuple[str, int, int], np.ndarray]:
    return {key: item["activation"].astype(np.float64) for key, item in items(full.output_dir).items()}


def pooled(x: np.ndarray, pool: str) -> np.ndarray:
    """One pool in float64."""
    if pool in ("first", "last"):
        return x[0 if pool == "first" else -1]
    if pool == "max":
        return x.max(axis=0)
    if pool == "mean":
        return x.mean(axis=0)
    age = np.arange(len(x))[::-1]
    weights = np.exp(-np.log(2) * age / (float(pool.removeprefix("exp:")) * len(x)))
    return (weights[:, None] * x).sum(axis=0) / weights.sum()


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("pack", [True, False])
def test_pools_are_those_of_each_sample_alone(full, tmp_path, pack):
    summary = run(replace(full, output_dir=str(tmp_path / "out"), pool=POOLS, pack=pack))
    found, everything = items(tmp_path / "out"), exact(full)
    assert found.keys() == everything.keys()
    for key, item in found.items():
        assert item["shape"] == item["activation"].shape == (len(POOLS), everything[key].shape[1])
        close(item["activation"], np.stack([pooled(everything[key], pool) for pool in POOLS]))
    assert summary.tokens == sum(len(line["input_ids"]) for line in LINES)
    assert verify(str(tmp_path / "out")).ok, verify(str(tmp_path / "out")).lines()


@pytest.mark.parametrize("ending", ["npy", "npz", "safetensors"])
def test_a_projection_is_a_product_with_its_matrix(full, tmp_path, ending):
    rng = np.random.default_rng(1)
    matrix, mean = rng.normal(size=(2, D_MODEL, 5)).astype(np.float32), rng.normal(size=(D_MODEL,)).astype(np.float32)
    path = tmp_path / f"pca.{ending}"
    if ending == "npy":
        np.save(path, matrix[0])
        matrix, mean = matrix[:1], np.zeros_like(mean)
    elif ending == "npz":
        np.savez(path, matrix=matrix, mean=mean)
    else:
        save_file({"matrix": matrix, "mean": mean}, path)
    out = tmp_path / "out"
    run(replace(full, output_dir=str(out), activation_type=("residual",), project=str(path)))
    for (site, layer, sample), item in items(out).items():
        of_layer = matrix[LAYERS.index(layer) if len(matrix) > 1 else 0].astype(np.float64)
        close(item["activation"], (exact(full)[site, layer, sample] - mean) @ of_layer)
    assert verify(str(out)).ok


@pytest.mark.parametrize("fmt", ["pickle", "safetensors"])
@pytest.mark.parametrize("pack", [True, False])
def test_the_largest_values_are_stored_with_their_places(full, tmp_path, fmt, pack):
    out = tmp_path / "out"
    run(replace(full, output_dir=str(out), topk=6, format=fmt, pack=pack))
    for arrays, x in restored_pairs(out, full, fmt).values():
        assert arrays["indices"].dtype == np.uint16
        values = np.take_along_axis(x, arrays["indices"].astype(int), axis=1)
        close(arrays["activation"], values)
        largest = np.sort(np.abs(x), axis=1)[:, ::-1][:, :6]
        np.testing.assert_allclose(np.abs(arrays["activation"]), largest, rtol=1e-5)
        assert all(len(set(row)) == 6 for row in arrays["indices"].tolist())
    assert verify(str(out)).ok


def restored_pairs(out: Path, full: RunConfig, fmt: str) -> dict:
    """(site, layer, sample) → its stored arrays, and its exact activations."""
    everything = exact(full)
    if fmt == "pickle":
        return {key: (item, everything[key]) for key, item in items(out).items()}
    pairs = {}
    for path in sorted(out.glob("tpu_0/**/*.safetensors")):
        tensors = load_file(path)
        for number, (start, stop) in zip(
            tensors["sample_idx"], itertools.pairwise(tensors["sample_offsets"]), strict=True
        ):
            for layer in LAYERS:
                names = {name for name in tensors if name.partition(".")[0] == f"layer_{layer}"}
                arrays = {name.partition(".")[2] or "activation": tensors[name][start:stop] for name in names}
                pairs[path.parent.name, layer, int(number)] = arrays, everything[path.parent.name, layer, int(number)]
    return pairs
