"""The fidelity certificate passes what is right and fails what is wrong, in both its commands."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file
from tiny_run import VOCAB, cache_dir, extract, token_lines, write_jsonl, write_model
from tiny_run import run as run_command
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
)
from without_torch import hide_torch

import core.jax_utils as jax_side
from analysis.certificate.certification import as_stored
from analysis.certificate.certified_outputs import certify_output
from analysis.certificate.certified_runs import certify_run
from analysis.certificate.fidelity import (
    FLOOR,
    FidelityReport,
    Figures,
    LayerFidelity,
    NextTokens,
    Tally,
    agreement,
)
from analysis.verification.verify import verify
from core.base.errors import RunError, UsageError
from core.run.config import RunConfig
from core.run.runner import run
from core.streams.sharded_dataset import write_dataset
from qwen2_jax import load_config
from torch_models.loading import ModelSource

_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**_GROUPED, **_TOKENS),
    "gemma2": Gemma2Config(**_GROUPED, **_TOKENS, head_dim=10, query_pre_attn_scalar=10, sliding_window=16),
    "gpt_neox": GPTNeoXConfig(**_SIZES, **_TOKENS),
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=512, **_TOKENS),
    "phi3": Phi3Config(**_GROUPED, **_TOKENS),
    "olmo2": Olmo2Config(**_GROUPED, **_TOKENS),
}


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("qwen2"))


def config(home: Path, model: Path, **flags) -> RunConfig:
    stream = write_jsonl(home / "s.jsonl", token_lines(10, seed=4, longest=60))
    return RunConfig(
        model_path=str(model),
        dataset_path=str(stream),
        output_dir=str(home / "out"),
        checkpoint_dir=str(home / "ck"),
        compilation_cache_dir=cache_dir(),
        **{"max_seq_length": 128, "certify": 3} | flags,
    )


def certificate(folder: Path) -> dict:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "fidelity.json").read_text(), parse_constant=no_constant)


def corrupted(model: Path, folder: Path, tensor: str) -> Path:
    """A copy of the model with the rows of one tensor permuted."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    weights[tensor] = np.ascontiguousarray(weights[tensor][rng.permutation(len(weights[tensor]))])
    save_file(weights, folder / "model.safetensors")
    return folder


def with_config(model: Path, folder: Path, **fields) -> Path:
    shutil.copytree(model, folder)
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stated | fields))
    return folder


@pytest.mark.parametrize(
    ("compute", "stored"), [("float32", "float32"), ("float32", "float16"), ("bfloat16", "bfloat16")]
)
def test_a_faithful_run_passes_in_every_dtype(compute, stored, qwen2, tmp_path):
    run(config(tmp_path, qwen2, compute_dtype=compute, dtype=stored), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert report["verdict"] == "pass"
    assert [(entry["site"], entry["layer"]) for entry in report["sites"]] == [("residual", layer) for layer in range(3)]
    assert report["samples"] == ["0", "1", "2"]
    assert report["next_token_agreement"]["ours"] > 0.9
    # Rounding to float16 moves a value by 2^-12 to 2^-11 of itself at most; to float32 not at all.
    bounds = {("float32", "float32"): (0, 0), ("float32", "float16"): (1e-5, 2**-11)}.get(
        (compute, stored), (1e-3, 0.2)
    )
    for entry in report["sites"]:
        assert bounds[0] <= entry["yardstick"]["token_error"] <= bounds[1]
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_of_a_family_passes_and_is_compared(name, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name])
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name or "ln_" in parameter_name else 0.0, 0.15)
    model.save_pretrained(tmp_path / "model")
    sites = tuple(load_config(str(tmp_path / "model")).site_widths)
    run(config(tmp_path, tmp_path / "model", activation_type=sites, dtype="float32"), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert report["not_compared"] == {}
    assert {entry["site"] for entry in report["sites"]} == set(sites)
    assert max(entry["ours"]["token_error"] for entry in report["sites"]) < 1e-5
    assert report["next_token_agreement"]["ours"] == 1.0
    again = certify_output(str(tmp_path / "out"), ModelSource(str(tmp_path / "model")), 4)
    assert again.ok
    assert not again.not_compared


CORRUPTIONS = [
    ("model.embed_tokens.weight", "float32"),
    ("model.layers.0.self_attn.q_proj.weight", "float32"),
    ("model.layers.1.self_attn.k_proj.bias", "float32"),
    ("model.layers.1.mlp.down_proj.weight", "float32"),
    ("model.layers.0.self_attn.k_proj.weight", "bfloat16"),
    ("model.layers.2.self_attn.v_proj.weight", "bfloat16"),
    ("model.layers.2.mlp.gate_proj.weight", "bfloat16"),
]


@pytest.mark.parametrize(("tensor", "compute"), CORRUPTIONS)
def test_a_weight_whose_rows_are_permuted_fails_and_nothing_is_written(tensor, compute, qwen2, tmp_path):
    wrong = corrupted(qwen2, tmp_path / "wrong", tensor)
    flags = config(tmp_path, wrong, compute_dtype=compute, certify_against=str(qwen2))
    with pytest.raises(RunError, match=r"not faithful: residual of layer \d is off by"):
        run(flags, certify_run)
    assert not list((tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(("tensor", "compute"), CORRUPTIONS[::3])
def test_shards_of_a_corrupted_model_fail(tensor, compute, qwen2, tmp_path):
    wrong = corrupted(qwen2, tmp_path / "wrong", tensor)
    run(config(tmp_path, wrong, compute_dtype=compute, certify=0))
    report = certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 4)
    assert not report.ok
    assert "other files than the model of the run" in report.notes[0]
    assert certificate(tmp_path / "out")["verdict"] == "fail"


def test_a_wrong_rope_theta_fails_in_both_commands(qwen2, tmp_path):
    wrong = with_config(qwen2, tmp_path / "wrong", rope_theta=50000.0)
    flags = config(tmp_path, wrong, certify_against=str(qwen2), compute_dtype="bfloat16")
    with pytest.raises(RunError, match="not faithful"):
        run(flags, certify_run)
    run(replace(flags, certify=0, certify_against=None))
    assert not certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 4).ok


def test_a_mistake_in_our_decoder_fails(qwen2, tmp_path, monkeypatch):
    """The same files on both sides, and norms with another epsilon."""
    load = jax_side.load_config

    def with_wrong_epsilon(*args, **named):
        return replace(load(*args, **named), norm_eps=0.05)

    monkeypatch.setattr(jax_side, "load_config", with_wrong_epsilon)
    with pytest.raises(RunError, match="not faithful"):
        run(config(tmp_path, qwen2), certify_run)


def test_the_next_tokens_are_those_of_our_own_head(qwen2, tmp_path):
    """Every site is right and the output head is another: only the next tokens tell."""
    wrong = with_config(qwen2, tmp_path / "wrong", tie_word_embeddings=False)
    weights = load_file(wrong / "model.safetensors")
    save_file(weights | {"lm_head.weight": -weights["model.embed_tokens.weight"]}, wrong / "model.safetensors")
    run(config(tmp_path, wrong, certify_against=str(qwen2), dtype="float32"), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert (report["verdict"], report["next_token_agreement"]["by"]) == ("pass", "our logits")
    assert report["next_token_agreement"]["ours"] < 0.2


def test_a_model_without_a_head_is_certified_without_next_tokens(qwen2, tmp_path):
    headless = with_config(qwen2, tmp_path / "headless", tie_word_embeddings=False)
    weights = load_file(headless / "model.safetensors")
    save_file(
        {name: array for name, array in weights.items() if name != "lm_head.weight"}, headless / "model.safetensors"
    )
    run(config(tmp_path, headless), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert report["verdict"] == "pass"
    assert report["next_token_agreement"] == {
        "by": "the reference has no output head",
        "ours": None,
        "yardstick": None,
        "positions": 0,
    }


def test_an_unfaithful_run_goes_on_when_told_to(qwen2, tmp_path):
    wrong = corrupted(qwen2, tmp_path / "wrong", "model.layers.1.mlp.down_proj.weight")
    flags = config(tmp_path, wrong, certify_against=str(qwen2), allow_unfaithful=True)
    assert run(flags, certify_run).status == "complete"
    report = certificate(tmp_path / "out/tpu_0")
    assert report["verdict"] == "fail"
    assert [entry["ok"] for entry in report["sites"]] == [True, False, False]


def test_nothing_of_a_sharded_dataset_is_written_before_it_is_certified(qwen2, tmp_path):
    source = write_jsonl(tmp_path / "source.jsonl", token_lines(12, longest=40))
    write_dataset(source, 12, str(tmp_path / "data"), num_shards=3, chunk_size_mb=0.005)
    wrong = corrupted(qwen2, tmp_path / "wrong", "model.layers.1.mlp.down_proj.weight")
    flags = replace(
        config(tmp_path, wrong, certify_against=str(qwen2)),
        dataset_path=None,
        use_sharded_dataset=True,
        sharded_dataset_dir=str(tmp_path / "data"),
    )
    with pytest.raises(RunError, match="not faithful"):
        run(flags, certify_run)
    assert not list((tmp_path / "out").rglob("*"))
    assert run(replace(flags, model_path=str(qwen2), certify_against=None), certify_run).status == "complete"
    assert certificate(tmp_path / "out/shard_000")["verdict"] == "pass"
    assert verify(str(tmp_path / "out")).ok


def test_the_torch_backend_is_certified_too(tmp_path):
    from transformers import OPTConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 3}
    model = AutoModelForCausalLM.from_config(OPTConfig(**sizes, num_attention_heads=4, **_TOKENS))
    model.save_pretrained(tmp_path / "model")
    run(config(tmp_path, tmp_path / "model", compute_dtype="bfloat16", activation_type=("q", "mlp")), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert (report["verdict"], report["about"]["backend"]) == ("pass", "torch")
    assert "one sample a row" in report["about"]["computed_by"]


def test_tokens_that_are_not_stored_are_not_compared(qwen2, tmp_path):
    selection = {"positions": ("3:",), "exclude_norm_outliers": 1.3, "max_tokens_per_sample": 5}
    run(config(tmp_path, qwen2, certify=0, dtype="float32", **selection))
    report = certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 10)
    assert report.ok
    assert 0 < report.tokens <= 5 * len(report.samples)
    assert report.next_tokens.positions == report.tokens


def test_a_run_that_leaves_tokens_out_is_certified_without_them(qwen2, tmp_path):
    """Token 7 is so loud that float16 cannot hold it: the run leaves it out, and so does its certificate."""
    loud = tmp_path / "loud"
    shutil.copytree(qwen2, loud)
    weights = load_file(loud / "model.safetensors")
    weights["model.embed_tokens.weight"][7] *= 1e6
    save_file(weights, loud / "model.safetensors")
    flags = config(tmp_path, loud)
    lines = [{"input_ids": [*range(20, 40), 7, *range(50, 60)]}] * 3
    write_jsonl(tmp_path / "s.jsonl", lines)
    with pytest.raises(RunError, match="sample_idx 0, residual: a value is NaN or out of range for float16"):
        run(flags, certify_run)
    run(replace(flags, exclude_norm_outliers=100.0), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert (report["verdict"], report["tokens"]) == ("pass", 3 * 30)


def test_samples_that_store_nothing_give_way_to_those_that_do(qwen2, tmp_path):
    flags = config(tmp_path, qwen2, positions=("5:",), certify=2, dtype="float32", shard_size_gb=1e-6)
    write_jsonl(tmp_path / "s.jsonl", [{"input_ids": list(range(20, 20 + n))} for n in (3, 4, 2, 9, 5, 7, 3)])
    run(flags, certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert (report["verdict"], report["samples"], report["tokens"]) == ("pass", ["3", "5"], 4 + 2)
    found = certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 7)
    assert (found.ok, found.samples, found.tokens) == (True, ("tpu_0:3", "tpu_0:5"), 4 + 2)
    assert certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 1).samples == ("tpu_0:3",)
    assert "only 6 tokens were compared" in report["notes"][0]


def test_a_run_that_stores_no_token_has_no_certificate(qwen2, tmp_path):
    run(config(tmp_path, qwen2, positions=("5:2",)), certify_run)
    assert verify(str(tmp_path / "out")).ok
    assert not (tmp_path / "out/tpu_0/fidelity.json").exists()
    with pytest.raises(RunError, match="no committed sample stores a token"):
        certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 4)


def test_samples_are_chosen_evenly_over_folders_and_windows(qwen2, tmp_path):
    flags = config(tmp_path, qwen2, certify=0, shard_size_gb=1e-5, dtype="float32", format="safetensors")
    for worker in (0, 1):
        run(replace(flags, machine_id=worker, total_machines=2, worker_id=worker))
    report = certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 4)
    assert report.samples == ("tpu_0:0", "tpu_0:6", "tpu_1:3", "tpu_1:9")
    one = certify_output(str(tmp_path / "out/tpu_1"), ModelSource(str(qwen2)), 100)
    assert one.samples == tuple(f"tpu_1:{index}" for index in (1, 3, 5, 7, 9))
    assert (tmp_path / "out/tpu_1/fidelity.json").exists()
    assert verify(str(tmp_path / "out")).ok


def test_the_next_token_is_left_out_where_nothing_stored_leads_to_it(qwen2, tmp_path):
    run(config(tmp_path, qwen2, layers_to_extract=(0,)), certify_run)
    assert certificate(tmp_path / "out/tpu_0")["next_token_agreement"]["ours"] > 0.9
    report = certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 2)
    assert report.next_tokens.ours is None
    assert "neither our logits nor the residual of the last layer nor final_norm are known" in "\n".join(report.lines())


def test_the_same_certificate_has_the_same_bytes(qwen2, tmp_path):
    run(config(tmp_path, qwen2, certify=0))
    path = tmp_path / "out/fidelity.json"
    written = []
    for _ in range(2):
        certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 3)
        written.append(path.read_bytes())
    assert written[0] == written[1]


def test_a_finished_run_is_not_certified_again(qwen2, tmp_path):
    flags = config(tmp_path, qwen2)
    run(flags, certify_run)
    (tmp_path / "out/tpu_0/fidelity.json").unlink()
    assert run(flags, certify_run).status == "complete"
    assert not (tmp_path / "out/tpu_0/fidelity.json").exists()


def test_another_model_is_refused_by_its_sizes(qwen2, tmp_path):
    run(config(tmp_path, qwen2, certify=0))
    wide = GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=3, n_head=4, n_positions=512, **_TOKENS)
    AutoModelForCausalLM.from_config(wide).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(RunError, match="its residual has width 48, that of the run 32"):
        certify_output(str(tmp_path / "out"), ModelSource(str(tmp_path / "gpt2")), 2)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run here"):
        certify_output(str(tmp_path), ModelSource("anything"), 2)


def test_the_commands_report_and_exit_as_they_should(qwen2, tmp_path):
    wrong = corrupted(qwen2, tmp_path / "wrong", "model.layers.1.mlp.down_proj.weight")
    stream = write_jsonl(tmp_path / "s.jsonl", token_lines(6, longest=40))
    flags = ("--dataset_path", stream, "--output_dir", tmp_path / "out")
    result = extract(tmp_path, *flags, "--model_path", wrong, "--certify", 2, "--certify_against", qwen2)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: --certify: not faithful: residual of layer")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*"))
    run(replace(config(tmp_path, wrong, certify=0), dataset_path=str(stream)))
    result = run_command(
        "analyze_activations.py", "certify", tmp_path / "out", "--model_path", qwen2, "--json", cwd=tmp_path
    )
    assert (result.returncode, json.loads(result.stdout)["verdict"]) == (1, "fail")
    assert "worst layer" in result.stderr


@pytest.mark.parametrize("command", ["extract", "certify"])
def test_without_torch_the_certificate_says_so_in_one_line(command, qwen2, tmp_path):
    hidden = hide_torch(tmp_path / "hidden")
    if command == "extract":
        stream = write_jsonl(tmp_path / "s.jsonl", token_lines(2))
        result = extract(tmp_path, "--model_path", qwen2, "--dataset_path", stream, "--certify", 2, **hidden)
    else:
        result = run_command(
            "analyze_activations.py", "certify", tmp_path, "--model_path", qwen2, cwd=tmp_path, **hidden
        )
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        f"error: {'--certify' if command == 'extract' else 'certify'}: the reference needs torch: "
        "pip install -c constraints.txt -e '.[torch]'"
    ]
    assert not (tmp_path / "activations").exists()


def test_an_extraction_without_a_certificate_needs_no_torch(qwen2, tmp_path):
    stream = write_jsonl(tmp_path / "s.jsonl", token_lines(2))
    hidden = hide_torch(tmp_path / "hidden")
    result = extract(tmp_path, "--model_path", qwen2, "--dataset_path", stream, **hidden)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("flags", [{"certify_against": "x"}, {"allow_unfaithful": True}])
def test_flags_of_the_certificate_need_it(flags, tmp_path):
    with pytest.raises(UsageError, match="needs --certify"):
        config(tmp_path, tmp_path, certify=0, **flags)


def test_figures_are_those_of_numpy_float64():
    rng = np.random.default_rng(0)
    ours, reference = rng.normal(size=(2, 7, 5)).astype(np.float32)
    tally = Tally()
    tally.add(ours[:3], reference[:3])
    tally.add(ours[3:], reference[3:])
    a, b = ours.astype(np.float64), reference.astype(np.float64)
    off, norms = np.linalg.norm(a - b, axis=1), np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(1) / norms / np.linalg.norm(a, axis=1)
    wanted = (np.linalg.norm(a - b) / np.linalg.norm(b), (off / norms).mean(), cosines.mean(), cosines.min())
    found = tally.figures()
    np.testing.assert_allclose(
        (found.relative_error, found.token_error, found.cosine_mean, found.cosine_worst), wanted, rtol=1e-12
    )
    assert found.max_error == np.abs(a - b).max()


def test_a_token_of_huge_norm_does_not_hide_the_others():
    reference = np.ones((10, 4))
    reference[0] = 1e6
    ours = reference * 1.0
    ours[1:] *= 1.3
    tally = Tally()
    tally.add(ours, reference)
    assert tally.figures().relative_error < 1e-5
    exact = Figures(0.0, 0.0, 1.0, 1.0, 0.0)
    assert not LayerFidelity("residual", 0, tally.figures(), exact).ok


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_fails_whatever_the_yardstick(value):
    reference = np.ones((3, 4), np.float32)
    ours = reference.copy()
    ours[1, 2] = value
    tally = Tally()
    tally.add(ours, reference)
    layer = LayerFidelity("residual", 0, tally.figures(), Figures(1e9, 1e9, 0.0, 0.0, 1e9))
    assert not layer.ok
    assert json.loads(json.dumps(layer.to_json(), allow_nan=False))["ours"]["token_error"] is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("places", [(1, 2), ...])
def test_a_reference_or_yardstick_that_is_not_a_number_excuses_nothing(places, value):
    reference, broken = np.ones((3, 4), np.float32), np.ones((3, 4), np.float32)
    broken[places] = value

    def figures(values: np.ndarray, truth: np.ndarray) -> Figures:
        tally = Tally()
        tally.add(values, truth)
        return tally.figures()

    assert not LayerFidelity("mlp", 0, figures(5 * reference, broken), figures(broken, broken)).ok
    assert not LayerFidelity("mlp", 0, figures(5 * reference, reference), figures(broken, reference)).ok


def test_errors_of_up_to_twice_the_yardstick_or_the_floor_pass():
    def layer(error: float, yardstick: float) -> LayerFidelity:
        sides = (Figures(value, value, 1.0, 1.0, 0.0) for value in (error, yardstick))
        return LayerFidelity("residual", 0, *sides)

    assert layer(0.02, 0.01).ok
    assert not layer(0.0201, 0.01).ok
    assert layer(FLOOR, 0.0).ok
    assert not layer(1.01 * FLOOR, 0.0).ok


def test_the_bars_mark_the_layers_that_fail():
    def layer(number: int, error: float, yardstick: float) -> LayerFidelity:
        sides = (Figures(value, value, 1.0, 1.0, 0.0) for value in (error, yardstick))
        return LayerFidelity("mlp", number, *sides)

    layers = (layer(0, 1e-3, 1e-3), layer(1, 1e-2, 1e-2), layer(2, 1.0, 1e-3))
    report = FidelityReport({}, ("0",), 7, layers, NextTokens("no"))
    line = next(line for line in report.lines() if line.startswith("mlp"))
    assert line.split() == ["mlp", "2", "1", "0.001", "0.002", "1.000000", "▁▃!", "▁▃▁"]
    assert "NOT faithful: mlp of layer 2 is off by 1 where 0.002 is allowed" in report.lines()


def test_values_beyond_the_stored_dtype_become_its_largest():
    values = np.array([1e6, -1e6, 1.0], np.float32)
    assert as_stored(values, "float16").tolist() == [65504.0, -65504.0, 1.0]
    assert np.isfinite(as_stored(np.array([3.4e38], np.float32), "bfloat16").astype(np.float32)).all()


def test_agreement_counts_places():
    assert agreement([np.array([1, 2]), np.array([3])], [np.array([1, 5]), np.array([3])]) == (2 / 3, 3)


def test_a_reduced_run_is_certified_before_it_is_reduced_and_not_afterwards(qwen2, tmp_path):
    run(config(tmp_path, qwen2, pool=("mean",), quantize="int8"), certify_run)
    report = certificate(tmp_path / "out/tpu_0")
    assert report["verdict"] == "pass"
    # Nothing is rounded to a stored dtype before it is reduced.
    assert all(entry["yardstick"]["token_error"] == 0 for entry in report["sites"])
    with pytest.raises(UsageError, match=r"its activations are reduced, .*extract with --certify N"):
        certify_output(str(tmp_path / "out"), ModelSource(str(qwen2)), 4)
