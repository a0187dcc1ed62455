"""A run that stores reduced activations, against float64 arithmetic on a run that stores all of them in float32."""

import gzip
import itertools
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from resealing import write_and_reseal
from safetensors.numpy import load_file, save_file
from tiny_run import (
    D_MODEL,
    committed_files,
    environment,
    extract,
    stream_config,
    token_lines,
    write_jsonl,
    write_model,
)

from analysis.verification.verify import verify
from core.base.dtypes import DTYPES
from core.base.errors import RunError, UsageError
from core.commit.record import CommitRecord
from core.hosts.pod_slice import SINGLE_HOST
from core.hosts.session import HostSession
from core.pricing.plan import price_run
from core.reduce.pooling import fetch_rows
from core.reduce.reducer import Reducer
from core.reduce.reductions import restore
from core.run.checks import prepare_job
from core.run.config import RunConfig
from core.run.runner import run
from core.run.stores import open_storage
from core.run.stream_run import LoadedStep, prepare_stream, run_stream
from core.step.backend import Step
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host
from core.step.layout import step_arrays

SITES, LAYERS, WIDTHS = ("k", "residual"), (0, 2), {"k": 16, "residual": D_MODEL}
LINES = [*token_lines(20, seed=5), {"input_ids": [7], "part": 0}]
POOLS = ("mean", "first", "last", "max", "exp:0.067")
Arrays = dict[str, np.ndarray]
Key = tuple[str, int, int]


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> RunConfig:
    """The run of everything in float32."""
    home = tmp_path_factory.mktemp("full")
    config = stream_config(
        home,
        write_model(home / "model"),
        LINES,
        max_seq_length=256,
        activation_type=SITES,
        layers_to_extract=LAYERS,
        dtype="float32",
        shard_size_gb=1e-4,
    )
    run(config)
    return config


@pytest.fixture(scope="module")
def step(full) -> Step:
    """The forward pass that all of these runs share."""
    job = prepare_job(full, "float32")
    return job.backend.load(full.model_path, None, replace(job.step_request, norm_sites=("residual",)))


@pytest.fixture(scope="module")
def exact(full) -> dict[Key, np.ndarray]:
    """What the run of everything stored, in float64."""
    return {key: item["activation"].astype(np.float64) for key, item in items(full.output_dir).items()}


def reduced(full: RunConfig, step: Step, out: Path, **flags) -> Path:
    """Runs with these flags into `out`; what it stored must verify."""
    job = prepare_job(replace(full, output_dir=str(out), **flags), "float32")
    prepared = prepare_stream(job, open_storage(job))
    model = LoadedStep(step, 0.0, Reducer(job.reduction, DTYPES[job.config.dtype]))
    session = HostSession(SINGLE_HOST, "run", threading.Event())
    assert run_stream(prepared, model, session, log=lambda line: None).status == "complete"
    assert verify(str(out)).ok, verify(str(out)).lines()
    return out


def items(out: str | Path) -> dict[Key, dict]:
    """(site, layer, sample_idx) → the stored dict, read with gzip and pickle alone."""
    found = {}
    for path in sorted(Path(out).glob("tpu_0/**/shard_*.pkl.gz")):
        for layer, samples in pickle.loads(gzip.decompress(path.read_bytes())).items():
            site = path.parent.name if path.parent.name in SITES else "residual"
            found |= {(site, layer, item["sample_idx"]): item for item in samples}
    return found


def tensors(out: Path) -> dict[Key, Arrays]:
    """The same of safetensors shards, read with their package alone."""
    found: dict[Key, Arrays] = {}
    for path in sorted(out.glob("tpu_0/*/*.safetensors")):
        stored = load_file(path)
        for number, (start, stop) in zip(
            stored["sample_idx"], itertools.pairwise(stored["sample_offsets"]), strict=True
        ):
            for name in stored.keys() - {"sample_idx", "sample_offsets", "token_ids", "positions"}:
                layer, _, array = name.removeprefix("layer_").partition(".")
                of_sample = found.setdefault((path.parent.name, int(layer), int(number)), {})
                of_sample[array or "activation"] = stored[name][start:stop]
    return found


def records(out: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out.glob("tpu_0/shard_*.json"))]


def pooled(x: np.ndarray, pool: str) -> np.ndarray:
    if pool in ("first", "last"):
        return x[0 if pool == "first" else -1]
    if pool in ("max", "mean"):
        return getattr(x, pool)(axis=0)
    age = np.arange(len(x))[::-1]
    weights = np.exp(-np.log(2) * age / (float(pool.removeprefix("exp:")) * len(x)))
    return (weights[:, None] * x).sum(axis=0) / weights.sum()


def close(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max(initial=1))


def test_pools_are_those_of_each_sample_alone(full, step, exact, tmp_path):
    out = reduced(full, step, tmp_path / "out", pool=POOLS)
    found = items(out)
    assert found.keys() == exact.keys()
    for key, item in found.items():
        assert item["shape"] == item["activation"].shape == (len(POOLS), WIDTHS[key[0]])
        close(item["activation"], np.stack([pooled(exact[key], pool) for pool in POOLS]))
    assert sum(record["n_tokens"] for record in records(out)) == sum(len(line["input_ids"]) for line in LINES)
    assert all(record["pools"] == list(POOLS) for record in records(out))


def test_what_is_brought_to_the_host_is_a_row_for_each_pool_of_a_sample(full, step):
    job = prepare_job(replace(full, pool=("mean", "max")), "float32")
    part = next(job.parts_of(next(job.windows())))
    layout = job.layouts_of(part)[0]
    output = step(step_arrays(layout, [sample.token_ids for sample in part.own.samples]))
    fetch = fetch_rows(layout, part.own.samples, part.own.lengths, job.pools)
    reduce = Reducer(job.reduction, DTYPES["float32"])
    output = on_host(begin_copies(reduce(gather(output, fetch.gathered), fetch)))
    most = max(map(len, layout.rows))
    for site, array in output.arrays.items():
        layers, rows, units, width = array.shape
        assert (layers, rows, width) == (len(LAYERS), layout.n_rows, WIDTHS[site])
        assert 2 * most <= units < 2 * 2 * most  # room for a power of two of samples
    assert all(peaks.shape == (layers, rows, units) for peaks in output.peaks.values())


def test_pools_are_of_the_tokens_that_norms_leave(full, step, tmp_path):
    rules = {"exclude_norm_outliers": 1.2, "positions": ("1:",), "shard_size_gb": 1.0}
    out = reduced(full, step, tmp_path / "out", pool=("mean", "last"), format="safetensors", **rules)
    run(replace(full, output_dir=str(tmp_path / "tokens"), **rules))
    found, tokens = tensors(out), items(tmp_path / "tokens")
    counts = {len(item["activation"]) for item in tokens.values()}
    assert 0 in counts, "no sample is empty"
    assert len(counts) > 5
    for key, item in tokens.items():
        kept = item["activation"].astype(np.float64)
        wanted = np.stack([pooled(kept, "mean"), kept[-1]]) if len(kept) else np.zeros((0, WIDTHS[key[0]]))
        assert found[key]["activation"].shape == wanted.shape
        close(found[key]["activation"], wanted)


@pytest.mark.parametrize(("kind", "matrices", "means"), [("int8", (2,), ()), ("fp8", (), (2,))])
def test_the_largest_values_of_a_projection_are_stored_as_codes(full, step, exact, tmp_path, kind, matrices, means):
    rng = np.random.default_rng(1)
    matrix, mean = (rng.normal(size=size).astype(np.float32) for size in ((*matrices, D_MODEL, 40), (*means, D_MODEL)))
    np.savez(tmp_path / "pca.npz", matrix=matrix, mean=mean)
    flags = {"project": str(tmp_path / "pca.npz"), "topk": 12, "quantize": kind, "quantize_block": 5}
    base = replace(full, activation_type=("residual",), dtype="float16")
    out = tmp_path / "out"
    job = prepare_job(base, "float32")
    alone = job.backend.load(base.model_path, None, replace(job.step_request, stored_dtype="float32"))
    reduced(base, alone, out, **flags)
    matrix, mean = np.broadcast_to(matrix, (2, D_MODEL, 40)), np.broadcast_to(mean, (2, D_MODEL))
    errors = {layer: [] for layer in LAYERS}
    for key, item in items(out).items():
        layer = LAYERS.index(key[1])
        wanted = (exact[key] - mean[layer]) @ matrix[layer].astype(np.float64)
        assert item["activation"].dtype == {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}[kind]
        assert (item["indices"].dtype, item["scale"].shape) == (np.uint16, (len(wanted), 3))
        largest = -np.sort(-np.abs(wanted), axis=1)[:, :12]
        restored = restore({name: item[name] for name in ("activation", "indices", "scale")}, 40, 5)
        assert (np.count_nonzero(restored, axis=1) <= 12).all()
        close(np.abs(np.take_along_axis(wanted, item["indices"].astype(int), axis=1)), largest)
        errors[key[1]] += (np.linalg.norm(restored - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).tolist()
    index = json.loads((out / "tpu_0/metadata.json").read_text())
    for layer, relative in errors.items():
        assert index["losses"]["residual"][str(layer)]["relative_l2"] == pytest.approx(np.mean(relative), rel=1e-3)
    assert records(out)[0]["sites"]["residual"] == {
        "layers": list(LAYERS),
        "width": 40,
        "block": 5,
        "arrays": {
            "activation": {"width": 12, "dtype": "int8" if kind == "int8" else "float8_e4m3fn"},
            "indices": {"width": 12, "dtype": "uint16"},
            "scale": {"width": 3, "dtype": "float32"},
        },
    }
    plan = json.loads((out / "run.json").read_text())
    assert (plan["dtype"], plan["reduction"]["topk"], plan["reduction"]["project"]["width"]) == (
        records(out)[0]["dtype"],
        12,
        40,
    )


def test_safetensors_hold_the_codes_the_scales_and_the_token_ids(full, step, exact, tmp_path):
    out = reduced(replace(full, dtype="float16"), step, tmp_path / "out", quantize="int8", format="safetensors")
    found = tensors(out)
    assert found.keys() == exact.keys()
    for key, arrays in found.items():
        assert arrays["scale"].shape == (len(exact[key]), WIDTHS[key[0]] // 32 or 1)
        bound = 0.501 * np.abs(exact[key]).max(axis=1, keepdims=True) / 127 + 1e-5
        assert (np.abs(restore(arrays, WIDTHS[key[0]], 32) - exact[key]) <= bound).all()
    stored = load_file(next(out.glob("tpu_0/residual/*.safetensors")))
    assert stored["layer_0"].dtype == np.int8
    assert stored["token_ids"].tolist()[:3] == LINES[0]["input_ids"][:3]


def test_an_interrupted_reduced_run_leaves_the_bytes_of_an_undisturbed_one(full, step, tmp_path):
    flags = {"pool": ("exp:0.3", "max"), "quantize": "int8", "quantize_block": 8, "dtype": "float16"}
    flags |= {"shard_size_gb": 3e-6}
    out, again = (reduced(full, step, tmp_path / name, **flags) for name in ("a", "b"))
    assert committed_files(out) == committed_files(again)
    assert len(records(out)) > 2
    names = list((again / "tpu_0").rglob("*_000[2-9]*"))
    assert names
    for path in names:
        path.unlink()
    reduced(full, step, again, **flags)
    assert committed_files(out) == committed_files(again)


def test_eight_devices_that_split_a_model_store_what_one_does(full, tmp_path):
    config = replace(
        full,
        output_dir="eight",
        activation_type=("k", "mlp_act", "residual"),
        exclude_norm_outliers=3.0,
        pool=("mean", "max", "last"),
        quantize="int8",
        quantize_block=8,
        dtype="float16",
        shard_size_gb=1.0,
        mesh="2x4",
    )
    script = """
        import sys, jax
        from core.run.config import RunConfig
        from core.run.runner import run
        assert jax.device_count() == 8
        run(eval(sys.argv[1]))
    """
    devices = environment(XLA_FLAGS="--xla_force_host_platform_device_count=8")
    argv = [sys.executable, "-c", textwrap.dedent(script), repr(config)]
    subprocess.run(argv, cwd=tmp_path, env=devices, check=True)
    run(replace(config, output_dir=str(tmp_path / "one"), mesh="auto"))
    of_one, of_eight = items(tmp_path / "one"), items(tmp_path / "eight")
    assert of_one.keys() == of_eight.keys()
    for key, item in of_one.items():
        np.testing.assert_allclose(of_eight[key]["scale"], item["scale"], rtol=1e-3)
        assert np.abs(of_eight[key]["activation"].astype(int) - item["activation"]).max() <= 1


@pytest.mark.parametrize(
    ("flags", "where"),
    [
        ({"pool": ("first", "mean")}, r"NaN or infinity in the pool mean of its tokens"),
        ({"topk": 3}, r"NaN or infinity at token 4"),
        ({"quantize": "fp8", "positions": ("2:",), "dtype": "float16"}, r"NaN or infinity at token 4"),
    ],
)
def test_a_nan_is_named_by_sample_and_layer(full, tmp_path, flags, where):
    broken = write_model(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][7] = np.inf
    save_file(weights, broken / "model.safetensors")
    lines = [{"input_ids": [*range(20, 60)]}, {"input_ids": [1, 2, 3, 4, 7, 5, 6, 8]}]
    config = replace(
        full,
        model_path=str(broken),
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", lines)),
        output_dir=str(tmp_path / "out"),
        activation_type=("resid_pre",),  # after it, attention spreads a NaN over the row
        layers_to_extract=(0,),
        **flags,
    )
    with pytest.raises(RunError, match=rf"sample_idx 1, resid_pre after layer 0: the model computes {where}"):
        run(config)
    assert committed_files(tmp_path / "out") == {}


def test_a_projection_that_does_not_fit_float16_is_named_and_codes_always_fit(full, tmp_path):
    np.save(tmp_path / "big.npy", np.full((D_MODEL, 3), 1e6, np.float32))
    config = replace(full, activation_type=("residual",), project=str(tmp_path / "big.npy"), dtype="float16")
    with pytest.raises(RunError, match=r"sample_idx \d+, residual after layer 0: magnitude \d+ at token \d+ does not"):
        run(replace(config, output_dir=str(tmp_path / "a")))
    run(replace(config, output_dir=str(tmp_path / "b"), quantize="int8"))
    assert verify(str(tmp_path / "b")).ok


def test_the_plan_prints_the_bytes_that_are_saved(full, tmp_path):
    config = replace(full, output_dir=str(tmp_path / "out"), plan=True)
    whole = price_run(config)
    plan = price_run(replace(config, pool=("mean",), quantize="int8", dtype="float16"))
    per_sample = sum(len(LAYERS) * (width + 4) for width in WIDTHS.values())
    assert plan.bytes_copied == len(LINES) * per_sample
    assert plan.bytes_copied_whole == whole.bytes_copied_whole // 2  # float16 and float32
    assert plan.bytes_on_disk < whole.bytes_on_disk / 10
    assert plan.bytes_saved > 0
    assert (plan.samples, plan.tokens, plan.stored_tokens) == (whole.samples, whole.tokens, whole.tokens)
    lines = "\n".join(plan.lines())
    assert "reduction        pool mean, quantize int8 (blocks of 32), which saves" in lines
    assert "device to host" in lines


def test_the_command_line_reduces_and_another_reduction_in_its_folder_is_refused(full, tmp_path):
    flags = ["--model_path", full.model_path, "--dataset_path", full.dataset_path, "--max_seq_length", 256]
    flags += ["--pool", "last", "exp:0.067", "--topk", 4, "--quantize", "fp8", "--json"]
    done = extract(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    assert {len(item["activation"]) for item in items(tmp_path / "activations").values()} == {2}
    again = extract(tmp_path, *flags, "--pool", "last", "exp:0.07")
    assert again.returncode == 2
    assert 'reduction.pool: ["last", "exp:0.067"] there, ["last", "exp:0.07"] here' in again.stderr


def damaged(out: Path, site: str, array: str, change) -> list[str]:
    """The problems after `change` of an array in a shard whose record is made to agree, as a bug would."""
    path = out / "tpu_0" / site / "shard_0001.pkl.gz"
    shard = pickle.loads(gzip.decompress(path.read_bytes()))
    shard[2][3][array] = change(shard[2][3][array])
    write_and_reseal(path, gzip.compress(pickle.dumps(shard)), out / "tpu_0")
    return [problem for folder in verify(str(out)).folders for problem in folder.problems]


def test_damage_of_every_array_is_found(full, step, tmp_path):
    def fresh(name: str) -> Path:
        return reduced(full, step, tmp_path / name, topk=3, quantize="int8", dtype="float16", shard_size_gb=1.0)

    out = fresh("a")
    assert any("sample 3, scale: a scale is negative" in p for p in damaged(out, "k", "scale", np.negative))
    assert any("3 different ones below 32" in p for p in damaged(out, "residual", "indices", np.zeros_like))
    out = fresh("b")
    assert any("sample 3, indices: dtype int64" in p for p in damaged(out, "k", "indices", lambda a: a.astype(int)))
    assert any("sample 3: dtype float32" in p for p in damaged(out, "residual", "activation", np.float32))


def test_a_record_without_reduction_says_nothing_of_one(full):
    for record in records(Path(full.output_dir)):
        assert not record.keys() & {"pools", "losses"}
        assert record["sites"]["k"] == {"layers": list(LAYERS), "width": 16}
    assert "reduction" not in json.loads((Path(full.output_dir) / "run.json").read_text())
    (data,) = [path.read_bytes() for path in Path(full.output_dir).glob("tpu_0/shard_0001.json")]
    assert CommitRecord.from_bytes(data).to_bytes() == data


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pool": ("median",)}, "--pool median: expected mean, first, last, max or exp:SHARE"),
        ({"pool": ("exp:0",)}, "--pool exp:0: expected"),
        ({"pool": ("exp",)}, "--pool exp: expected"),
        ({"pool": ("mean:2",)}, "--pool mean:2: expected"),
        ({"pool": ("exp:0.5", "exp:.50")}, "--pool exp:0.5: it is given twice"),
        ({"topk": 0}, "--topk 0: must be at least 1"),
        ({"quantize": "int4"}, "--quantize int4: must be one of int8, fp8"),
        ({"quantize_block": 4}, "--quantize_block 4: needs --quantize"),
        ({"quantize": "int8", "quantize_block": -1}, "--quantize_block -1: must not be negative"),
        ({"quantize": "fp8", "dtype": "bfloat16"}, "--dtype bfloat16: --quantize fp8 stores fp8: leave --dtype out"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(flags, message):
    with pytest.raises(UsageError) as refused:
        RunConfig(dataset_path="s.jsonl", **flags)
    assert str(refused.value).startswith(message)


def test_what_does_not_fit_the_model_is_refused_before_it_is_loaded(full, tmp_path):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "a.npy", rng.normal(size=(D_MODEL, 4)))
    np.save(tmp_path / "b.npy", rng.normal(size=(3, 16, 4)))
    coded = {"quantize": "int8", "dtype": "float16"}
    for message, flags in {
        "--topk 17: k is only 16 wide": {"topk": 17},
        "--quantize_block 33: no row has more than 32 values: pass 0 for one scale per row": coded
        | {"quantize_block": 33},
        "--quantize_block 5: no row has more than 4 values: pass 0 for one scale per row": coded
        | {"quantize_block": 5, "topk": 4},
        f"--project {tmp_path}/a.npy: its matrix has 32 rows, k is 16 wide": {"project": str(tmp_path / "a.npy")},
        f"--project {tmp_path}/b.npy: it has matrices for 3 layers, k has 2": {"project": str(tmp_path / "b.npy")},
    }.items():
        with pytest.raises(UsageError) as refused:
            prepare_job(replace(full, output_dir=str(tmp_path / "out"), **flags), "float32")
        assert str(refused.value) == message
    one_site = {"activation_type": ("residual",), "project": str(tmp_path / "a.npy"), "topk": 5}
    with pytest.raises(UsageError, match="--topk 5: the projected residual is only 4 wide"):
        prepare_job(replace(full, **one_site), "float32")
    by_default = prepare_job(replace(full, **coded, topk=4), "float32")
    assert by_default.reduction.quantization.block == 32, "the default block may be wider than a row"
