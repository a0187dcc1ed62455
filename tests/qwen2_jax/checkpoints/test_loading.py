"""Model folders as they come: whole, in pieces, in bf16, broken."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from hf_reference import SIZES, everything, forward, save, tiny_model, worst_token
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig

from core.base.errors import ModelError
from qwen2_jax import (
    Capture,
    families,
    load_config,
    load_model,
    load_tokenizer,
    model_identity,
    tokenizer_digest,
)
from qwen2_jax.checkpoints import locate

TOKENS = np.random.default_rng(2).integers(0, SIZES["vocab_size"], (1, 9))
CONFIG = LlamaConfig(
    **SIZES,
    hidden_size=48,
    num_attention_heads=6,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)

EMPTY_BPE = {"type": "BPE", "vocab": {}, "merges": []}


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
    np.testing.assert_array_equal(loaded["layers.mlp.up.weight"].astype(np.float32), up)


def test_rounding_to_bf16_is_to_nearest_even(folder):
    exact = parameters(load_model(str(folder)))["layers.mlp.up.weight"]
    rounded = parameters(load_model(str(folder), dtype="bfloat16"))["layers.mlp.up.weight"]
    np.testing.assert_array_equal(rounded, exact.astype(ml_dtypes.bfloat16))


def test_an_early_cut_reads_only_its_layers_and_computes_the_same(folder, pristine):
    cut = load_model(str(folder), n_layers=2)
    assert parameters(cut)["layers.attn.q.weight"].shape[0] == 2
    assert "lm_head.weight" not in parameters(cut)
    ours = forward(cut, TOKENS, everything(cut, logits=False))
    whole = forward(load_model(str(pristine)), TOKENS, Capture((0, 1)))
    assert worst_token(ours["residual"], whole["residual"]) < 1e-6
    with pytest.raises(ModelError, match="logits need the final norm"):
        forward(cut, TOKENS, Capture((0,), logits=True))


def test_without_head_nothing_else_is_missing(folder):
    headless = load_model(str(folder), with_final_norm=False, with_head=False)
    everywhere = forward(headless, TOKENS, everything(headless, logits=False))
    assert everywhere["residual"].shape == (4, 1, 9, 48)
    assert not any(name.startswith(("lm_head", "final_norm")) for name in parameters(headless))


def test_a_model_saved_without_its_head_loads_where_no_logits_are_asked(pristine, tmp_path):
    AutoModelForCausalLM.from_pretrained(pristine).model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    whole = parameters(load_model(str(pristine), with_head=False))
    assert {name: array.tolist() for name, array in parameters(load_model(str(tmp_path), with_head=False)).items()} == {
        name: array.tolist() for name, array in whole.items()
    }
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        load_model(str(tmp_path))


GPT2 = GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=64)
NEOX = GPTNeoXConfig(**SIZES, hidden_size=48, num_attention_heads=4)
GEMMA3 = Gemma3TextConfig(
    **SIZES, hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=12, query_pre_attn_scalar=12
)
OTHER_NAMES = {
    "gpt2 without its prefix, with masks": (
        GPT2,
        lambda name: name.removeprefix("transformer."),
        {"h.0.attn.bias": (1, 1, 64, 64), "h.0.attn.masked_bias": ()},
    ),
    "gpt_neox with the head's other name": (
        NEOX,
        lambda name: name.replace("embed_out.", "lm_head."),
        {"gpt_neox.layers.1.attention.bias": (1, 1, 8, 8), "gpt_neox.layers.1.attention.rotary_emb.inv_freq": (2,)},
    ),
    "a head beside a model without its prefix": (CONFIG, lambda name: name.removeprefix("model."), {}),
}


@pytest.mark.parametrize(("config", "rename", "buffers"), OTHER_NAMES.values(), ids=OTHER_NAMES)
def test_other_names_of_the_same_tensors_are_understood(config, rename, buffers, tmp_path):
    folder = save(tiny_model(config), tmp_path)
    plain = parameters(load_model(str(folder)))
    weights = {rename(name): array for name, array in load_file(folder / "model.safetensors").items()}
    save_file(
        weights | {name: np.ones(shape, np.float32) for name, shape in buffers.items()}, folder / "model.safetensors"
    )
    renamed = parameters(load_model(str(folder)))
    assert plain.keys() == renamed.keys()
    for name, array in plain.items():
        np.testing.assert_array_equal(array, renamed[name])


MULTIMODAL = {
    "before transformers 4.52": lambda name: f"language_model.{name}",
    "after": lambda name: name.replace("model.", "model.language_model.", 1),
}


@pytest.mark.parametrize("rename", MULTIMODAL.values(), ids=MULTIMODAL)
def test_the_text_decoder_of_a_multimodal_model_is_that_of_the_text_model(rename, tmp_path):
    text = save(tiny_model(GEMMA3), tmp_path / "text")
    whole = tmp_path / "whole"
    whole.mkdir()
    weights = {rename(name): array for name, array in load_file(text / "model.safetensors").items()}
    weights["vision_tower.patches.weight"] = np.ones((3, 3), np.float32)
    save_file(weights, whole / "model.safetensors")
    fields = json.loads((text / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": fields}))
    ours, theirs = parameters(load_model(str(whole))), parameters(load_model(str(text)))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])


def test_two_names_of_one_tensor_are_refused(tmp_path):
    folder = save(tiny_model(NEOX), tmp_path)
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w["embed_out.weight"] + 1}))
    with pytest.raises(ModelError, match=r"lm_head\.weight is there twice, once as (embed_out|lm_head)\.weight"):
        load_model(str(folder))


def test_a_fused_tensor_of_the_wrong_size_names_what_its_parts_need(tmp_path):
    folder = save(tiny_model(NEOX), tmp_path)
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    edit_weights(folder, lambda w: w.update({name: w[name][:-1]}))
    with pytest.raises(ModelError, match=r"query_key_value\.weight has shape \(143, 48\) .* \(144, 48\)"):
        load_model(str(folder))


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


def store_twice(folder):
    shutil.copy(folder / "model.safetensors", folder / "second.safetensors")
    (folder / "model.safetensors").rename(folder / "first.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "first.safetensors", "b": "second.safetensors"}})
    )


BROKEN = {
    "no config.json": lambda f: (f / "config.json").unlink(),
    "config.json: not valid JSON": lambda f: (f / "config.json").write_text("{"),
    "a JSON object is needed, found list": lambda f: (f / "config.json").write_text("[]"),
    "model_type 'bert' is not supported; supported are gemma": lambda f: edit_config(f, model_type="bert"),
    "hidden_act 'mish' is not supported": lambda f: edit_config(f, hidden_act="mish"),
    "rms_norm_eps is missing": lambda f: edit_config(f, rms_norm_eps=None),
    "hidden_size must be a positive integer, found '48'": lambda f: edit_config(f, hidden_size="48"),
    "num_attention_heads 6 is not a multiple of num_key_value_heads 4": lambda f: edit_config(f, num_key_value_heads=4),
    "gptq weights are not supported": lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}),
    "config.json: quantization_config: fp8 weights": lambda f: edit_config(f, quantization_config="fp8"),
    "config.json: quantization_config: unknown weights": lambda f: edit_config(f, quantization_config={}),
    "no model.safetensors": lambda f: (f / "model.safetensors").unlink(),
    "model.safetensors: not a whole safetensors file": lambda f: truncate(f / "model.safetensors"),
    "model.safetensors: not a whole": lambda f: (f / "model.safetensors").write_bytes(b""),
    "is there and in first.safetensors": lambda f: store_twice(f),
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


PLAIN = {"rope_theta": 1e4}
YARN = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2}
WRONG_TYPES = [
    ({"rms_norm_eps": "x"}, "rms_norm_eps must be a positive number, found 'x'"),
    ({"rms_norm_eps": True}, "rms_norm_eps must be a positive number, found True"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, found nan"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be a positive number, found 1000"),
    ({"rope_theta": "abc"}, "rope_theta must be a positive number, found 'abc'"),
    ({"rope_theta": [1e4]}, "rope_theta must be a positive number"),
    ({"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": "foo"}, "rope_scaling must be a JSON object"),
    ({"rope_parameters": ["default"]}, "rope_parameters must be a JSON object"),
    ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a positive number"),
    ({"rope_parameters": PLAIN | {"rope_type": ["yarn"]}}, "rope_type ['yarn'] is not supported"),
    ({"rope_parameters": PLAIN | {"type": 1}}, "type 1 is not supported"),
    ({"rope_parameters": PLAIN | {"type": "linear", "factor": "2"}}, "factor must be a positive number"),
    ({"rope_parameters": YARN | {"mscale": "1", "mscale_all_dim": 1}}, "mscale must be a positive number"),
    ({"rope_parameters": YARN | {"beta_fast": "x"}}, "beta_fast must be a positive number"),
    ({"rope_parameters": YARN | {"truncate": "no"}}, "truncate must be true or false"),
    ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    ({"hidden_act": {"silu": 1}}, "hidden_act {'silu': 1} is not supported"),
    ({"num_key_value_heads": "2"}, "num_key_value_heads must be a positive integer"),
    ({"attention_bias": "false"}, "attention_bias must be true or false"),
    ({"tie_word_embeddings": 0}, "tie_word_embeddings must be true or false"),
    ({"model_type": "mistral", "sliding_window": "4"}, "sliding_window must be a positive integer"),
    ({"model_type": "qwen2", "use_sliding_window": "no"}, "use_sliding_window must be true or false"),
    (
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "max_window_layers": "2"},
        "max_window_layers must be an integer, found '2'",
    ),
    ({"model_type": "qwen2", "layer_types": 4}, "layer_types must be a JSON list"),
    ({"model_type": "qwen2", "layer_types": [["full_attention"]] * 4}, "layer type ['full_attention'] is not"),
]


@pytest.mark.parametrize(("edits", "message"), WRONG_TYPES, ids=[message for _, message in WRONG_TYPES])
def test_a_value_of_the_wrong_type_gets_one_line_naming_file_and_field(edits, message, folder):
    edit_config(folder, **edits)
    with pytest.raises(ModelError) as refusal:
        load_config(str(folder))
    assert str(refusal.value).startswith(f"{folder / 'config.json'}: {message}")
    assert "\n" not in str(refusal.value)


def test_no_value_of_any_field_brings_a_python_error(folder):
    fields = json.loads((folder / "config.json").read_text())
    for field in [*fields, "rope_theta", "rope_scaling", "partial_rotary_factor", "original_max_position_embeddings"]:
        for value in ("x", [], ["x"], {"x": 1}, -1, 0, 1.5, True):
            (folder / "config.json").write_text(json.dumps(fields | {field: value}))
            with contextlib.suppress(ModelError):
                load_config(str(folder))


def test_what_a_family_fails_to_check_is_still_one_line_with_the_file(folder, monkeypatch):
    careless = families.Family(lambda fields: fields["hidden_size"] + fields["model_type"], {})
    monkeypatch.setitem(families.FAMILIES, "llama", careless)
    with pytest.raises(ModelError, match=r"config\.json: a field has a value of the wrong kind \(unsupported operand"):
        load_config(str(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "./models/none"])
def test_a_path_that_is_not_there_is_named(path):
    with pytest.raises(ModelError, match="no such folder or file"):
        load_config(path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc: a file that opens and cannot be read")
@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_config),
        ("model.safetensors", load_model),
        ("model.safetensors", model_identity),
        ("model.safetensors.index.json", load_model),
        ("tokenizer.json", tokenizer_digest),
        ("model.gguf", load_config),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name, load, folder):
    if name == "model.gguf":
        (folder / "config.json").unlink()
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/proc/self/mem")
    with pytest.raises(ModelError) as refusal:
        load(str(folder))
    assert str(refusal.value).startswith(f"{folder / name}: cannot be read (")
    assert "\n" not in str(refusal.value)


@pytest.fixture
def as_anybody(folder, monkeypatch):
    """Permissions hold for the test, though root runs it: `model` is reached from within its parent folder."""
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    monkeypatch.chdir(folder.parent)

    @contextlib.contextmanager
    def without_rights():
        user = os.geteuid()
        os.seteuid(user or 65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return without_rights


@pytest.mark.parametrize(
    ("load", "name"),
    [(load_config, "config.json"), (load_model, "model.safetensors"), (load_config, "x.gguf"), (load_tokenizer, ".")],
)
def test_a_file_without_permission_is_named(load, name, as_anybody):
    place = Path("model", name)
    if name == "x.gguf":
        Path("model", "config.json").rename(place)
    place.chmod(0)
    with as_anybody(), pytest.raises(ModelError) as refusal:
        load("model")
    place.chmod(0o755)
    assert str(refusal.value).startswith(f"{place}")
    assert str(refusal.value).endswith(": cannot be read (Permission denied)")


NOWHERE = "^nobody/nothing: no such local folder, not in the hub's cache, and "


def test_a_model_that_is_not_cached_is_refused_offline_in_one_line():
    with pytest.raises(ModelError, match=rf"{NOWHERE}HF_HUB_OFFLINE forbids downloads\Z"):
        load_model("nobody/nothing")


def test_an_unreachable_hub_is_one_line_that_names_no_class(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelError, match=rf"{NOWHERE}the request to the model hub failed: .*refused\Z"):
        load_model("nobody/nothing")


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # transformers builds Qwen2's without any file, empty
@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}'}])
def test_a_folder_without_tokenizer_says_how_to_give_one(files, family, folder):
    edit_config(folder, model_type=family)
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ModelError, match=f"^no tokenizer files in {folder}; give one with --tokenizer_path$"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.json": "{}", "merges.txt": ""},
        {"tokenizer.json": json.dumps({"version": "1.0", "added_tokens": [], "model": EMPTY_BPE})},
    ],
    ids=lambda files: min(files),
)
def test_a_tokenizer_with_no_vocabulary_is_no_tokenizer(files, folder):
    edit_config(folder, model_type="qwen2")
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(ModelError, match=f"{folder}: the tokenizer's vocabulary is empty; .*--tokenizer_path"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"added_tokens": [], "model": 5}'])
def test_a_broken_tokenizer_is_one_line(text, folder):
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"^.*no tokenizer could be loaded \(.*\); give one with --tokenizer_path$"):
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


@pytest.fixture
def moving_hub(pristine, tmp_path, monkeypatch):
    """A hub whose branch moves on between any two downloads; what was asked of it, in order."""
    asked = []

    def download(repo, *, revision, allow_patterns):
        commit = revision if revision and revision.startswith("commit") else f"commit{len(asked)}"
        asked.append((repo, revision, allow_patterns))
        return str(shutil.copytree(pristine, tmp_path / "snapshots" / commit, dirs_exist_ok=True))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locate.branch_commit.cache_clear()
    yield asked
    locate.branch_commit.cache_clear()


@pytest.mark.parametrize("revision", ["main", None])
def test_config_weights_and_tokenizer_are_of_one_commit(revision, moving_hub):
    load_config("org/model", revision)
    assert model_identity("org/model", revision)["revision"] == "commit0"
    tokenizer_digest("org/model", revision)
    assert [asked for _, asked, _ in moving_hub] == [revision, "commit0", "commit0", "commit0"]
    assert {repo for repo, _, _ in moving_hub} == {"org/model"}
    assert model_identity("org/model", "elsewhere")["revision"] == "commit4"


def test_only_what_is_needed_is_fetched(moving_hub):
    load_config("org/model")
    assert {tuple(patterns) for _, _, patterns in moving_hub} == {("config.json",)}
    model_identity("org/model")
    assert "*.safetensors" in moving_hub[-1][2]
    assert not any("bin" in pattern for _, _, patterns in moving_hub for pattern in patterns)


def test_bin_files_are_fetched_where_there_are_no_safetensors(pristine, tmp_path, monkeypatch):
    bins = tmp_path / "snapshots/commit"
    bins.mkdir(parents=True)
    shutil.copy(pristine / "config.json", bins)
    asked = []

    def download(repo, *, revision, allow_patterns):
        asked.append(allow_patterns)
        if any("bin" in pattern for pattern in allow_patterns):
            tensors = {name: torch.tensor(array) for name, array in load_file(pristine / "model.safetensors").items()}
            torch.save(tensors, bins / "pytorch_model.bin")
        return str(bins)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    locate.branch_commit.cache_clear()
    assert parameters(load_model("org/model")).keys() == parameters(load_model(str(pristine))).keys()
    assert sum("*.safetensors" in patterns for patterns in asked) == 1
    locate.branch_commit.cache_clear()
