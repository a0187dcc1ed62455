"""Runs of the whole engine with `--backend torch`."""

import gzip
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_run import cache_dir, committed_files, extract, stream_config, write_jsonl, write_model
from tiny_run import run as run_command
from torch_families import N_LAYERS, VOCAB, WIDTH, save_tiny, tiny_model, worst_token
from without_torch import hide_torch

from analysis.verification.verify import verify
from core.backends import choose_backend
from core.base.errors import ModelError, UsageError
from core.pricing.plan import price_run
from core.reduce.reductions import restore
from core.run.config import RunConfig
from core.run.runner import run

SITES = ("attn", "mlp_act", "residual", "final_norm")


def lines(n: int) -> list[dict]:
    rng = np.random.default_rng(3)
    return [{"input_ids": rng.integers(3, VOCAB, int(rng.integers(1, 60))).tolist()} for _ in range(n)]


@pytest.fixture(scope="module")
def opt_run(tmp_path_factory) -> RunConfig:
    """A finished run of a tiny OPT, in several windows."""
    home = tmp_path_factory.mktemp("opt")
    config = stream_config(
        home,
        save_tiny("opt", home / "model"),
        lines(20),
        max_seq_length=64,
        activation_type=SITES,
        layers_to_extract=(0, 2),
        dtype="float32",
        shard_size_gb=1e-4,
    )
    run(config)
    return config


def stored(out: str) -> dict[tuple[str, int, int], np.ndarray]:
    """(site, layer, sample_idx) → array, read with gzip and pickle alone."""
    return {
        (path.parent.name, layer, item["sample_idx"]): item["activation"]
        for path in sorted(Path(out).glob("tpu_0/*/shard_*.pkl.gz"))
        for layer, items in pickle.loads(gzip.decompress(path.read_bytes())).items()
        for item in items
    }


def test_what_is_stored_is_what_transformers_computes_of_each_sample_alone(opt_run):
    model, found = tiny_model("opt"), stored(opt_run.output_dir)
    samples = lines(20)
    assert len(found) == len(samples) * (3 * 2 + 1)
    for index, line in enumerate(samples):
        with torch.no_grad():
            states = model(torch.tensor([line["input_ids"]]), output_hidden_states=True).hidden_states
        assert worst_token(found["residual", 0, index], states[1][0].numpy()) < 1e-5
        assert worst_token(found["final_norm", N_LAYERS, index], states[-1][0].numpy()) < 1e-5
        assert found["mlp_act", 2, index].shape == (len(line["input_ids"]), 52)
    assert verify(opt_run.output_dir).ok


def test_the_plan_names_the_backend_and_the_family(opt_run):
    plan = json.loads((Path(opt_run.output_dir) / "run.json").read_text())
    assert (plan["backend"], plan["model"]["family"]) == ("torch", "opt")


def test_windows_extracted_again_have_the_same_bytes(opt_run):
    out = Path(opt_run.output_dir)
    before = committed_files(out)
    records = sorted(out.glob("tpu_0/shard_*.json"))
    assert len(records) > 2
    for record in records[1:]:
        record.unlink()
    for path in out.glob("tpu_0/*/shard_0002.pkl.gz"):
        path.unlink()
    run(opt_run)
    assert committed_files(out) == before


def test_samples_of_a_batch_do_not_depend_on_each_other(opt_run, tmp_path):
    run(replace(opt_run, output_dir=str(tmp_path / "out"), batch_size=1))
    alone, batched = stored(str(tmp_path / "out")), stored(opt_run.output_dir)
    assert alone.keys() == batched.keys()
    assert max(worst_token(batched[key], array) for key, array in alone.items()) < 1e-5


def test_selected_tokens_are_those_of_the_run_that_stores_all(opt_run, tmp_path):
    out = str(tmp_path / "out")
    config = replace(opt_run, output_dir=out, positions=("1:40",), exclude_norm_outliers=1.2, max_tokens_per_sample=6)
    run(config)
    assert verify(config.output_dir).ok
    all_tokens, some = stored(opt_run.output_dir), stored(config.output_dir)
    tables = sorted(Path(config.output_dir).glob("tpu_0/samples_*.jsonl.gz"))
    rows = [json.loads(line) for path in tables for line in gzip.decompress(path.read_bytes()).splitlines()]
    reasons = set().union(*(row["dropped"] for row in rows))
    assert {"position", "norm_outlier", "limit"} <= reasons
    for row in rows:
        kept = np.ones(len(row["token_ids"]), bool)
        for start, stop in (span for spans in row["dropped"].values() for span in spans):
            kept[start:stop] = False
        for site, layer in (("attn", 2), ("final_norm", N_LAYERS)):
            key = (site, layer, row["sample_idx"])
            # Other windows, so other batches: up to rounding.
            np.testing.assert_allclose(some[key], all_tokens[key][kept], rtol=1e-4, atol=1e-6)


def test_the_other_backend_is_refused_in_the_same_folder(tmp_path):
    model = write_model(tmp_path / "model")
    config = stream_config(
        tmp_path,
        model,
        lines(3),
        max_seq_length=64,
        layers_to_extract=(0,),
    )
    run(config)
    assert "backend" not in json.loads((tmp_path / "out/run.json").read_text())
    with pytest.raises(UsageError, match='backend: null there, "torch" here'):
        run(replace(config, backend="torch"))


def test_jax_and_torch_store_the_same_numbers(tmp_path):
    config = RunConfig(
        model_path=str(write_model(tmp_path / "model")),
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", lines(6))),
        checkpoint_dir=str(tmp_path / "ck"),
        compilation_cache_dir=cache_dir(),
        max_seq_length=64,
        activation_type=("q", "attn_heads", "resid_mid", "mlp_act", "residual"),
        dtype="float32",
    )
    for backend in ("jax", "torch"):
        run(replace(config, backend=backend, output_dir=str(tmp_path / backend)))
    ours, theirs = stored(str(tmp_path / "jax")), stored(str(tmp_path / "torch"))
    assert ours.keys() == theirs.keys()
    assert max(worst_token(ours[key], array) for key, array in theirs.items()) < 1e-5


def test_auto_is_jax_where_the_family_is_known_and_torch_elsewhere(tmp_path, smollm2):
    assert choose_backend("auto", str(write_model(tmp_path / "qwen2", tokenizer=False))).name == "jax"
    assert choose_backend("auto", str(save_tiny("opt", tmp_path / "opt"))).name == "torch"
    assert choose_backend("auto", str(smollm2)).name == "jax"


def test_code_of_models_is_never_run_by_jax(tmp_path):
    with pytest.raises(UsageError, match="--trust_remote_code: the JAX backend runs no code"):
        choose_backend("auto", str(write_model(tmp_path, tokenizer=False)), trust_remote_code=True)


def test_hosts_are_joined_by_jax_alone(opt_run):
    with pytest.raises(UsageError, match="--multihost"):
        run(replace(opt_run, multihost=True))


@pytest.mark.parametrize("mesh", ["2d", "2x4"])
def test_a_model_is_split_over_devices_by_jax_alone(mesh, opt_run):
    with pytest.raises(UsageError, match=f"--mesh {mesh}: the torch backend runs on one device"):
        run(replace(opt_run, mesh=mesh))


@pytest.mark.parametrize("flags", [("--backend", "torch"), ()])
def test_without_torch_one_line_names_the_extra(flags, opt_run, tmp_path):
    result = extract(
        tmp_path, "--model_path", opt_run.model_path, "--dataset_path", opt_run.dataset_path, *flags,
        **hide_torch(tmp_path / "hidden"),
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith("needs torch: pip install -c constraints.txt -e '.[torch]'")
    assert len(result.stderr.splitlines()) == 1
    if not flags:
        assert "opt is no family of the JAX backend" in result.stderr
    assert not (tmp_path / "activations").exists()


def test_a_site_that_the_model_lacks_leaves_nothing_behind(tmp_path):
    config = RunConfig(
        model_path=str(save_tiny("gptj", tmp_path / "model")),
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", lines(2))),
        output_dir=str(tmp_path / "out"),
        checkpoint_dir=str(tmp_path / "ck"),
        max_seq_length=64,
        activation_type=("resid_mid",),
    )
    with pytest.raises(ModelError, match="resid_mid cannot be captured: attention and MLP run in parallel"):
        run(config)
    assert not (tmp_path / "out/run.json").exists()


def test_list_hooks_describes_a_model_of_any_family(opt_run, tmp_path):
    result = run_command("analyze_activations.py", "list-hooks", opt_run.model_path, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = json.loads(result.stdout)
    widths = {row["site"]: row["width"] for row in table["rows"]}
    assert (table["family"], widths["residual"], widths["mlp_act"]) == ("opt", WIDTH, 52)


def test_a_plan_is_priced_with_torch_too(opt_run, tmp_path):
    report = price_run(replace(opt_run, plan=True, output_dir=str(tmp_path / "new")))
    assert report.samples == 20
    assert report.padding_waste > 0


def test_rows_longer_than_the_models_positions_are_refused(opt_run, tmp_path):
    with pytest.raises(UsageError, match="knows 64 positions"):
        run(replace(opt_run, max_seq_length=65, output_dir=str(tmp_path / "new")))


def test_reductions_mean_the_same_of_what_torch_computes(opt_run, tmp_path):
    """One implementation for both backends: here of the activations that the run of all tokens stored."""
    whole = stored(opt_run.output_dir)
    base = replace(opt_run, shard_size_gb=1.0)
    run(replace(base, output_dir=str(tmp_path / "pooled"), pool=("mean", "last"), positions=("1:",)))
    for key, pooled in stored(str(tmp_path / "pooled")).items():
        kept = whole[key].astype(np.float64)[1:]
        wanted = np.stack([kept.mean(axis=0), kept[-1]]) if len(kept) else np.zeros((0, kept.shape[1]))
        np.testing.assert_allclose(pooled, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(initial=1))
    run(replace(base, output_dir=str(tmp_path / "codes"), topk=9, quantize="int8", dtype="float16"))
    for path in (tmp_path / "codes/tpu_0/mlp_act").glob("*.pkl.gz"):
        for layer, items in pickle.loads(gzip.decompress(path.read_bytes())).items():
            for item in items:
                found = restore({name: item[name] for name in ("activation", "indices", "scale")}, 52, 32)
                exact = whole["mlp_act", layer, item["sample_idx"]]
                largest = np.abs(exact) >= np.sort(np.abs(exact), axis=1)[:, -9:-8]
                bound = 0.501 * np.abs(exact).max(axis=1, keepdims=True) / 127 + 1e-6
                assert (np.abs(found - np.where(largest, exact, 0)) <= bound).all()
    assert verify(str(tmp_path / "pooled")).ok
    assert verify(str(tmp_path / "codes")).ok
