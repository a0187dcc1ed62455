"""Model folders as they come: whole, in pieces, in bf16, broken."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hf_reference import SIZES, everything, forward, save, tiny_model, worst_token
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qwen2_jax import Capture, ModelError, load_config, load_model, load_tokenizer, model_identity

TOKENS = np.random.default_rng(2).integers(0, SIZES["vocab_size"], (1, 9))
CONFIG = LlamaConfig(
    **SIZES,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return save(tiny_model(CONFIG), tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "model")


def edit_config(folder, **edits):
    path = folder / "config.json"
    fields = json.loads(path.read_text()) | edits
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def edit_weights(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path)


def parameters(decoder) -> dict[str, np.ndarray]:
    flat = nnx.to_flat_state(nnx.split(decoder)[1])
    return {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}


def test_an_indexed_checkpoint_loads_as_the_single_file_does(pristine, tmp_path):
    tiny_model(CONFIG).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole, pieces = parameters(load_model(str(pristine))), parameters(load_model(str(tmp_path)))
    assert whole.keys() == pieces.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, pieces[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bf16_checkpoint_keeps_every_bit(dtype, tmp_path):
    model = tiny_model(CONFIG).to(torch.bfloat16)
    loaded = parameters(load_model(str(save(model, tmp_path)), dtype=dtype))
    assert all(array.dtype == dtype for array in loaded.values())
    up = torch.stack([layer.mlp.up_proj.weight for layer in model.model.layers]).float().detach().numpy()
    np.testing.assert_array_equal(loaded["layers.up"].astype(np.float32), up)


def test_rounding_to_bf16_is_to_nearest_even(folder):
    exact = parameters(load_model(str(folder)))["layers.up"]
    rounded = parameters(load_model(str(folder), dtype="bfloat16"))["layers.up"]
    np.testing.assert_array_equal(rounded, exact.astype(ml_dtypes.bfloat16))


def test_an_early_cut_reads_only_its_layers_and_computes_the_same(folder, pristine):
    cut = load_model(str(folder), n_layers=2)
    assert parameters(cut)["layers.q"].shape[0] == 2
    assert "head.lm_head" not in parameters(cut)
    ours = forward(cut, TOKENS, everything(cut, logits=False))
    whole = forward(load_model(str(pristine)), TOKENS, Capture((0, 1)))
    assert worst_token(ours["residual"], whole["residual"]) < 1e-6
    with pytest.raises(ModelError, match="logits need the final norm"):
        forward(cut, TOKENS, Capture((0,), logits=True))


def test_without_head_nothing_else_is_missing(folder):
    headless = load_model(str(folder), with_head=False)
    everywhere = forward(headless, TOKENS, everything(headless, logits=False))
    assert everywhere["residual"].shape == (4, 1, 9, 48)
    assert not any(name.startswith("head") for name in parameters(headless))


def test_a_model_saved_without_its_head_loads_where_no_logits_are_asked(pristine, tmp_path):
    AutoModelForCausalLM.from_pretrained(pristine).model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    whole = parameters(load_model(str(pristine), with_head=False))
    assert {name: array.tolist() for name, array in parameters(load_model(str(tmp_path), with_head=False)).items()} == {
        name: array.tolist() for name, array in whole.items()
    }
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("n_layers", [0, 5])
def test_a_cut_outside_the_model_is_refused(n_layers, folder):
    with pytest.raises(ModelError, match=f"{n_layers} layers asked for, the model has 4"):
        load_model(str(folder), n_layers=n_layers)


def test_a_missing_weight_is_named(folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight"):
        load_model(str(folder))


def test_a_left_over_weight_is_named(folder):
    edit_weights(folder, lambda w: w.update({"model.layers.1.self_attn.q_norm.weight": np.ones(8, np.float32)}))
    with pytest.raises(ModelError, match=r"no place for model\.layers\.1\.self_attn\.q_norm\.weight"):
        load_model(str(folder))


def test_biases_the_config_does_not_announce_are_left_over(tmp_path):
    model = tiny_model(LlamaConfig(**CONFIG.to_dict() | {"attention_bias": True}))
    with pytest.raises(ModelError, match=r"no place for .*k_proj\.bias, .* and 12 more"):
        load_model(str(save(model, tmp_path, attention_bias=False)))


def test_derived_rotary_buffers_are_ignored(folder):
    edit_weights(folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}))
    load_model(str(folder))


@pytest.mark.parametrize("copy_is_equal", [True, False])
def test_a_tied_output_head_may_be_there_twice_only_if_equal(copy_is_equal, tmp_path):
    folder = save(tiny_model(LlamaConfig(**CONFIG.to_dict() | {"tie_word_embeddings": True})), tmp_path)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + (not copy_is_equal)}))
    if copy_is_equal:
        load_model(str(folder))
    else:
        with pytest.raises(ModelError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
            load_model(str(folder))


def test_a_wrong_shape_names_the_tensor_and_both_shapes(folder):
    edit_weights(folder, lambda w: w.update({"model.layers.3.mlp.down_proj.weight": np.ones((48, 51), np.float32)}))
    with pytest.raises(ModelError, match=r"layers\.3\.mlp\.down_proj\.weight has shape \(48, 51\) .* \(48, 52\)"):
        load_model(str(folder))


def test_an_integer_weight_is_refused(folder):
    edit_weights(folder, lambda w: w.update({"model.norm.weight": np.ones(48, np.int8)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I8"):
        load_model(str(folder))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


BROKEN = {
    "no config.json": lambda f: (f / "config.json").unlink(),
    "config.json: not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "a JSON object is needed, found list": lambda f: (f / "config.json").write_text("[]"),
    "model_type 'bert' is not supported; supported are llama": lambda f: edit_config(f, model_type="bert"),
    "hidden_act 'relu' is not supported": lambda f: edit_config(f, hidden_act="relu"),
    "rms_norm_eps is missing": lambda f: edit_config(f, rms_norm_eps=None),
    "hidden_size must be a positive integer, found '48'": lambda f: edit_config(f, hidden_size="48"),
    "num_attention_heads 6 is not a multiple of num_key_value_heads 4": lambda f: edit_config(f, num_key_value_heads=4),
    "gptq weights are not supported": lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
    "no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors: not a whole safetensors file": lambda f: truncate(f / "model.safetensors"),
    "model.safetensors: not a whole": lambda f: (f / "model.safetensors").write_bytes(b""),
}


@pytest.mark.parametrize(("message", "break_it"), BROKEN.items(), ids=BROKEN)
def test_a_broken_folder_gets_one_line_that_names_it(message, break_it, folder):
    break_it(folder)
    with pytest.raises(ModelError) as refusal:
        load_model(str(folder))
    text = str(refusal.value)
    assert message in text
    assert str(folder) in text
    assert "\n" not in text


def test_a_piece_the_index_names_but_nobody_has_is_named(tmp_path):
    tiny_model(CONFIG).save_pretrained(tmp_path, max_shard_size="50KB")
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        load_model(str(tmp_path))


def test_qwen2_layer_types_must_agree_with_the_window(folder):
    edit_config(folder, model_type="qwen2", layer_types=["sliding_attention"] * 4)
    with pytest.raises(ModelError, match="layer_types slides but use_sliding_window is not set"):
        load_config(str(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "./models/none", "gs://bucket/model"])
def test_a_path_that_is_not_there_is_named(path):
    with pytest.raises(ModelError, match="no such folder or file"):
        load_config(path)


def test_an_unreachable_hub_is_one_line():
    with pytest.raises(ModelError) as refusal:
        load_model("Qwen/Qwen2.5-0.5B")
    assert str(refusal.value).startswith("Qwen/Qwen2.5-0.5B: no such local folder, and the model hub did not give it")
    assert "\n" not in str(refusal.value)


def test_a_folder_without_tokenizer_says_how_to_give_one(folder):
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded .*--tokenizer_path"):
        load_tokenizer(str(folder))


def test_identity_follows_the_content_not_the_place(pristine, folder):
    here, there = model_identity(str(pristine)), model_identity(str(folder))
    assert here == there
    assert here["family"] == "llama"
    assert here["revision"] is None
    digests = []
    for first in (3.0, 4.0):  # the same size both times
        edit_weights(folder, lambda weights, first=first: weights["model.norm.weight"].__setitem__(0, first))
        digests.append(model_identity(str(folder))["digest"])
    edit_config(folder, rms_norm_eps=1e-4)
    assert len({here["digest"], *digests, model_identity(str(folder))["digest"]}) == 4


def test_a_hub_snapshot_knows_its_commit(pristine, tmp_path, monkeypatch):
    snapshot = tmp_path / "snapshots" / "0123abc"
    shutil.copytree(pristine, snapshot)
    asked = {}

    def download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert model_identity("org/model", "main")["revision"] == "0123abc"
    assert asked["repo"] == "org/model"
    assert asked["revision"] == "main"
    assert "*.safetensors" in asked["patterns"]
    load_config("org/model")
    assert asked["patterns"] == ["config.json"]
