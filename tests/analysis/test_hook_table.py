"""`list-hooks`: what is listed can be asked for, and costs what is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import N_LAYERS, cache_dir, run, token_lines, write_jsonl, write_model

from analysis.hook_table import hook_table
from core.base.errors import UsageError
from core.run.checks import prepare_job
from core.run.config import RunConfig
from qwen2_jax import load_config


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Its weights are not there: nobody needs them."""
    folder = write_model(tmp_path_factory.mktemp("model"), tokenizer=False)
    (folder / "model.safetensors").rename(folder.parent / f"{folder.name}.weights")
    return folder


def test_the_table_is_one_line_a_site_with_every_spelling(model, tmp_path):
    result = run("analyze_activations.py", "list-hooks", model, "--max_seq_length", 100, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0][1:3] == ["qwen2,", "3"]
    assert ["k", "blocks.{i}.attn.hook_k", "model.layers.{i}.self_attn.k_proj", "(16,)", "0..2"] in [
        line[:5] for line in lines
    ]
    assert ["mlp_act", "blocks.{i}.mlp.hook_post", "-", "(64,)", "0..2", "128", "B", "384", "B"] in [
        line[:9] for line in lines
    ]
    assert ["embedding", "hook_embed", "model.embed_tokens", "(32,)", "-1"] in [line[:5] for line in lines]


def test_the_json_holds_the_same(model, tmp_path):
    flags = ("--layers", 0, 2, "--dtype", "float32", "--max_seq_length", 10, "--json")
    table = json.loads(run("analyze_activations.py", "list-hooks", model, *flags, cwd=tmp_path).stdout)
    row = next(row for row in table["rows"] if row["site"] == "mlp_act")
    assert (row["layers"], row["width"], row["bytes_per_token"]) == ([0, 2], 64, 256)
    assert row["bytes_per_token_all_layers"] == 512
    assert row["bytes_per_million_tokens"] == 512_000_000
    assert row["bytes_per_sample"] == 5120
    assert table["rows"][-1]["layers"] == [N_LAYERS]


def test_every_name_that_is_listed_can_be_captured_at_the_listed_size(model, tmp_path):
    weights = model / "model.safetensors"
    (model.parent / f"{model.name}.weights").rename(weights)
    config = RunConfig(
        model_path=str(model),
        dataset_path=str(write_jsonl(tmp_path / "s.jsonl", token_lines(2))),
        compilation_cache_dir=cache_dir(),
        max_seq_length=256,
        dtype="bfloat16",
    )
    table = hook_table("m", load_config(str(model)), dtype="bfloat16")
    for row in table.rows:
        for name in filter(None, (row.site, row.transformer_lens, row.hugging_face)):
            job = prepare_job(replace(config, activation_type=(name,)), "float32")
            assert job.layers == {row.site: row.layers}
            assert job.bytes_per_token == {row.site: row.bytes_per_token_all_layers}
    weights.rename(model.parent / f"{model.name}.weights")


def test_modules_of_a_family_that_is_not_known_are_not_guessed(model):
    table = hook_table("m", replace(load_config(str(model)), family="another"))
    assert {row.hugging_face for row in table.rows} == {None}
    assert "hook_embed" in {row.transformer_lens for row in table.rows}


def test_layers_and_lengths_that_the_model_lacks_are_refused(model):
    shape = load_config(str(model))
    with pytest.raises(UsageError, match="--layers 3: m has layers 0 to 2"):
        hook_table("m", shape, layers=[3])
    with pytest.raises(UsageError, match="5000: m knows 4096 positions: pass --max_seq_length 4096 or less"):
        hook_table("m", shape, max_seq_length=5000)
