"""`stats`, `whiten` and `verify` as commands and as functions, on a run of a tiny model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import D_MODEL, run, stream_config, token_lines, write_model

import analyze_activations
from core.base.errors import UsageError
from core.run import runner

CONFIG = {"shard_size_gb": 60_000 / 2**30, "activation_type": ("residual", "mlp"), "max_seq_length": 128}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """About four windows of 30 samples, two sites."""
    folder = tmp_path_factory.mktemp("commands")
    write_model(folder / "model", tokenizer=False)
    runner.run(stream_config(folder, folder / "model", token_lines(30, longest=90), **CONFIG))
    return folder


def analyze(home: Path, *args: object):
    return run("analyze_activations.py", *args, cwd=home)


def test_stats_prints_a_table_and_one_object_and_leaves_a_file(home):
    done = analyze(home, "stats", "out", "--output", "stats.npz", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sites"].keys() == {"residual", "mlp"}
    assert found["sites"]["mlp"].keys() == {"0", "1", "2"}
    layer = found["sites"]["mlp"]["1"]
    with np.load(home / "stats.npz") as file:
        assert file["mlp/1/covariance"].shape == (D_MODEL, D_MODEL)
        assert layer["count"] == file["mlp/1/count"][0]
        np.testing.assert_allclose(layer["mean_norm"], np.linalg.norm(file["mlp/1/mean"]), rtol=1e-5)
    assert "mean norm" in done.stderr
    assert "mlp 1: largest tokens: " in done.stderr
    assert not (home / "out/analysis").exists()
    again = analyze(
        home, "stats", "out", "--layer", 1, "--site", "mlp", "--runner", "threads", "--workers", 2, "--json"
    )
    assert json.loads(again.stdout)["sites"] == {"mlp": {"1": layer}}


def test_whiten_fit_check_and_apply(home):
    fit = analyze(home, "whiten", "fit", "out", "--layer", 1, "--site", "mlp", "--output", "w.safetensors", "--json")
    assert fit.returncode == 0, fit.stderr
    found = json.loads(fit.stdout)
    assert (found["method"], found["width"]) == ("zca", D_MODEL)
    assert found["check"]["max_error"] < 1e-5
    check = analyze(home, "whiten", "check", "out", "--layer", 1, "--site", "mlp", "--whitening", "w.safetensors")
    assert check.returncode == 0, check.stderr
    assert "within the tolerance" in check.stderr
    wrong = analyze(
        home, "whiten", "check", "out", "--layer", 2, "--site", "mlp", "--whitening", "w.safetensors", "--json"
    )
    assert wrong.returncode == 1
    assert json.loads(wrong.stdout)["ok"] is False
    apply = analyze(
        home, "whiten", "apply", "out", "--layer", 1, "--site", "mlp", "--whitening", "w.safetensors", "--to", "npz",
        "--output", "white", "--chunk_samples", 8, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert json.loads(apply.stdout)["chunks"] == 4
    rows = []
    for path in sorted((home / "white/chunks").iterdir()):
        with np.load(path) as chunk:
            rows.append(chunk["activations"][chunk["attention_mask"] != 0])
    whole = np.concatenate(rows).astype(np.float64)
    np.testing.assert_allclose(np.cov(whole.T), np.eye(D_MODEL), atol=1e-3)


def test_verify_takes_the_same_flags_and_says_the_same(home):
    plain = analyze(home, "verify", "out", "--json")
    assert plain.returncode == 0, plain.stderr
    for more in (["--runner", "local"], ["--workers", 2, "--partials", "partials"]):
        assert json.loads(analyze(home, "verify", "out", "--json", *more).stdout) == json.loads(plain.stdout)
    assert not (home / "partials").exists()


def test_kept_partials_disturb_neither_verify_nor_a_run_that_goes_on(home, tmp_path):
    shutil.copytree(home, tmp_path / "home")
    config = stream_config(tmp_path / "home", home / "model", token_lines(30, longest=90), **CONFIG)
    before = analyze(tmp_path / "home", "verify", "out", "--json").stdout
    analyze_activations.stats(config.output_dir, keep_partials=True)
    assert list((tmp_path / "home/out/analysis").rglob("*.partial"))
    assert analyze(tmp_path / "home", "verify", "out", "--json").stdout == before
    (last, *_) = sorted((tmp_path / "home/out/tpu_0").glob("shard_*.json"), reverse=True)
    last.unlink()
    assert runner.run(config).shards == 1
    assert analyze(tmp_path / "home", "verify", "out", "--json").stdout == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["stats", "nowhere"], 2, "error: nowhere: no run here"),
        (["stats", "out", "--drop", "bos"], 2, "error: drop='bos' needs tokenizer"),
        (["stats", "out", "--drop", "frist"], 2, "error: drop='frist': expected one or several of first"),
        (["stats", "out", "--runner", "local", "--workers", "2"], 2, "error: runner local has one worker"),
        (["whiten", "fit", "out", "--output", "x"], 2, "error: "),
        (["whiten", "fit", "out", "--site", "mlp", "--layer", "1", "--components", "3", "--output", "x"], 2, "use pca"),
        (
            ["whiten", "fit", "out", "--drop", "0:2", "--stats", "s.npz", "--output", "x"],
            2,
            "tokens that count are those",
        ),
        (["whiten", "check", "out", "--whitening", "missing"], 2, "error: missing: there is no such file"),
        (["whiten"], 2, "error: the following arguments are required: step"),
    ],
)
def test_errors_are_one_line(home, arguments, code, message):
    done = analyze(home, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_functions_take_plain_arguments(home):
    report = analyze_activations.stats(home / "out", layer=1, site="mlp", partials="none")
    assert report.layers["mlp"][1]["count"] > 0
    fit = analyze_activations.whiten_fit(home / "out", 1, site="mlp", method="pca", components=3)
    assert fit.whitening.kept == 3
    assert analyze_activations.verify(home / "out", runner="local").ok
    with pytest.raises(UsageError, match="worker: no such argument: did you mean workers"):
        analyze_activations.stats(home / "out", worker=2)
