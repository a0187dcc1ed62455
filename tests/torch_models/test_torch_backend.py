"""The step of the torch backend against transformers run on each sample alone."""

import json
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_families import CONFIGS, N_LAYERS, ODD_CONFIGS, VOCAB, WIDTH, save_tiny, tiny_model, worst_token
from transformers import AutoModelForCausalLM

from core.base.dtypes import DTYPES
from core.base.errors import ModelError
from core.step.backend import StepRequest
from core.step.gathering import gather
from core.step.host_copies import begin_copies, on_host
from core.step.layout import StepArrays
from qwen2_jax.taps import SITES, Capture
from torch_models.backend import TorchBackend, missing_reason
from torch_models.probing import Taps

LENGTHS = (9, 1, 14)
LENGTH = 16


def batch(lengths=LENGTHS, seed: int = 0) -> StepArrays:
    """Ragged rows of random tokens, padded on the right, and one empty row."""
    rng = np.random.default_rng(seed)
    tokens, segments, positions = (np.zeros((len(lengths) + 1, LENGTH), np.int32) for _ in range(3))
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(3, VOCAB, length)
        segments[row, :length] = 1
        positions[row, :length] = np.arange(length)
    return StepArrays(tokens, segments, positions)


def load(folder, *sites, layers=range(N_LAYERS), stored="float32", compute="float32", norms=()):
    request = StepRequest(Capture(tuple(layers), sites), stored, compute, norms)
    return TorchBackend().load(str(folder), None, request)


def fetch(step, arrays, places=None):
    return on_host(begin_copies(gather(step(arrays), places))).arrays


def hidden_states(model, ids) -> list[np.ndarray]:
    with torch.no_grad():
        output = model(torch.tensor([ids.tolist()]), output_hidden_states=True, use_cache=False)
    return [state[0].float().numpy() for state in output.hidden_states]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_padded_batch_gives_what_each_sample_gives_alone(name, tmp_path):
    model, arrays = tiny_model(name), batch()
    model.save_pretrained(tmp_path)
    values = fetch(load(tmp_path, "resid_pre", "residual", "final_norm"), arrays)
    assert values["residual"].shape == (N_LAYERS, len(LENGTHS) + 1, LENGTH, WIDTH)
    for row, length in enumerate(LENGTHS):
        states = hidden_states(model, arrays.tokens[row, :length])
        for layer in range(N_LAYERS):
            assert worst_token(values["resid_pre"][layer, row, :length], states[layer]) < 1e-5
        for layer in range(N_LAYERS - 1):
            assert worst_token(values["residual"][layer, row, :length], states[layer + 1]) < 1e-5
        assert worst_token(values["final_norm"][0, row, :length], states[-1]) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_attn_and_mlp_are_what_is_added_to_the_residual_stream(name, tmp_path):
    values = fetch(load(save_tiny(name, tmp_path), "resid_pre", "attn", "mlp", "residual"), batch())
    added = values["resid_pre"] + values["attn"] + values["mlp"]
    for row, length in enumerate(LENGTHS):
        assert worst_token(added[:, row, :length], values["residual"][:, row, :length]) < 1e-5
        assert np.abs(values["attn"][:, row, :length]).min(axis=(0, 1)).max() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_put_out_a_weighted_mean_of_the_values(name, tmp_path):
    """Of two tokens: the first one's output is its own value, the second one's lies between the two values."""
    values = fetch(load(save_tiny(name, tmp_path), "v", "attn_heads"), batch((2, 2, 2)))
    heads, head_dim = 4, WIDTH // 4
    v, z = (values[site][:, :3, :2].reshape(N_LAYERS, 3, 2, -1, head_dim) for site in ("v", "attn_heads"))
    v = np.repeat(v, heads // v.shape[3], axis=3)
    first, second = v[:, :, 0], v[:, :, 1]
    np.testing.assert_allclose(z[:, :, 0], first, rtol=1e-5, atol=1e-6)
    step = second - first
    share = ((z[:, :, 1] - first) * step).sum(-1, keepdims=True) / np.square(step).sum(-1, keepdims=True)
    assert ((share > 0) & (share < 1)).all()
    np.testing.assert_allclose(z[:, :, 1], first + share * step, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_of_a_model_without_rotation_give_the_attention_weights(tmp_path):
    """OPT has learned positions: softmax(q k / sqrt(H)) v in float64 is what its heads put out."""
    arrays = batch()
    values = fetch(load(save_tiny("opt", tmp_path), "q", "k", "v", "attn_heads"), arrays)
    for row, length in enumerate(LENGTHS):
        q, k, v, z = (
            values[site][:, row, :length].astype(np.float64).reshape(N_LAYERS, length, 4, 8)
            for site in ("q", "k", "v", "attn_heads")
        )
        logits = np.einsum("LTNH,LSNH->LNTS", q, k) / np.sqrt(8)
        logits = np.where(np.tril(np.ones((length, length), bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        np.testing.assert_allclose(np.einsum("LNTS,LSNH->LTNH", weights, v), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "gptj", "cohere"])
def test_bfloat16_is_as_far_from_float32_as_transformers_own(name, tmp_path):
    model, arrays = tiny_model(name), batch()
    model.save_pretrained(tmp_path)
    ours = fetch(load(tmp_path, "residual", compute="bfloat16", stored="bfloat16"), arrays)["residual"]
    assert ours.dtype.name == "bfloat16"
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    errors, theirs = [], []
    for row, length in enumerate(LENGTHS):
        exact = hidden_states(model, arrays.tokens[row, :length])[1]
        errors.append(worst_token(ours[0, row, :length].astype(np.float32), exact))
        theirs.append(worst_token(hidden_states(rounded, arrays.tokens[row, :length])[1], exact))
    assert 0 < max(errors) < 1.5 * max(theirs)


def test_embedding_has_no_positions_and_is_scaled_where_the_model_scales_it(tmp_path):
    arrays = batch()
    for name, scale in (("opt", 1.0), ("granite", 12.0)):
        model = tiny_model(name)
        model.config.embedding_multiplier = scale
        if name == "granite":
            model.model.embedding_multiplier = scale
        model.save_pretrained(tmp_path / name)
        values = fetch(load(tmp_path / name, "embedding", layers=()), arrays)["embedding"]
        wanted = scale * model.get_input_embeddings().weight.detach().numpy()[arrays.tokens[0, : LENGTHS[0]]]
        np.testing.assert_allclose(values[0, 0, : LENGTHS[0]], wanted, rtol=1e-5)


def test_blocks_behind_the_last_captured_one_are_neither_held_nor_run(tmp_path, monkeypatch):
    ran = []
    step = load(save_tiny("opt", tmp_path), "attn", layers=(1,))
    layers = step._reader.model.model.decoder.layers
    assert len(layers) == 2
    for module in (*layers, layers[1].fc1, step._reader.model.lm_head):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    fetch(step, batch())
    # attn of block 1 is all that is asked for: its MLP and the head do not run, and it does not end.
    assert ran == [layers[0]]


def test_the_final_norm_is_captured_without_logits(tmp_path):
    step, ran = load(save_tiny("bloom", tmp_path), "final_norm", layers=()), []
    step._reader.model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    assert fetch(step, batch())["final_norm"].shape == (1, len(LENGTHS) + 1, LENGTH, WIDTH)
    assert not ran


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_only_the_tokens_at_the_places_that_are_asked_for_are_fetched(tmp_path, stored):
    output = load(save_tiny("opt", tmp_path), "residual", "q", stored=stored)(batch())
    places = np.array([[8, 0], [0, 0], [3, 13], [0, 0]], np.int32)
    whole, some = (on_host(begin_copies(gather(output, of))) for of in (None, places))
    for site, values in some.arrays.items():
        assert values.dtype == DTYPES[stored]
        for row, of_row in enumerate(places[:3]):
            np.testing.assert_array_equal(values[:, row], whole.arrays[site][:, row, of_row])
            np.testing.assert_array_equal(some.peaks[site][:, row], whole.peaks[site][:, row, of_row])


def test_norms_and_peaks_are_those_before_the_cast(tmp_path):
    step, arrays = load(save_tiny("opt", tmp_path), "residual", stored="float16", norms=("residual",)), batch()
    exact = fetch(load(tmp_path, "residual"), arrays)["residual"]
    output = on_host(step(arrays))
    for row, length in enumerate(LENGTHS):
        tokens = (slice(None), row, slice(length))
        np.testing.assert_allclose(output.norms["residual"][tokens], np.linalg.norm(exact, axis=-1)[tokens], 1e-6)
        np.testing.assert_array_equal(output.peaks["residual"][tokens], np.abs(exact).max(-1)[tokens])


def test_nan_is_an_infinite_peak(tmp_path):
    model = tiny_model("opt")
    with torch.no_grad():
        model.get_input_embeddings().weight[5, 3] = torch.nan
    model.save_pretrained(tmp_path)
    arrays = batch((4, 4))
    arrays.tokens[:2, :4] = (3, 4, 5, 6), (7, 8, 9, 10)
    peaks = on_host(load(tmp_path, "residual")(arrays)).peaks["residual"]
    assert peaks[0, 0, 2] == np.inf
    assert np.isfinite(peaks[:, 1]).all()


@pytest.mark.parametrize(
    ("name", "site", "why"),
    [
        ("opt_350m", "attn", "no two module outputs satisfy"),
        ("opt_350m", "embedding", "not as wide as the residual stream"),
        ("opt_350m", "final_norm", "width 16 is not 32"),
        ("granite", "mlp", "no two module outputs satisfy"),
        ("mixtral", "mlp_act", "no single linear map"),
        ("gptj", "resid_mid", "in parallel"),
        ("bloom", "embedding", "more than a scale and positions"),
        ("stablelm", "attn_proj", "the same as attn"),
    ],
)
def test_a_site_whose_numbers_do_not_bear_it_out_is_refused_by_name(name, site, why, tmp_path):
    with pytest.raises(ModelError, match=f"{site} cannot be captured: .*{re.escape(why)}"):
        load(save_tiny(name, tmp_path), site)


def test_a_site_that_was_not_found_for_no_known_reason_is_said_by_its_meaning():
    reason = missing_reason(Taps({}, {}, {}, rows_alone=False), "mlp")
    assert reason == f"no module was found with these values: {SITES['mlp'].meaning}"


@pytest.mark.parametrize("name", ["opt_350m", "granite", "mamba", "mixtral"])
def test_the_residual_stream_of_an_odd_model_is_still_captured(name, tmp_path):
    model, arrays = tiny_model(name), batch()
    model.save_pretrained(tmp_path)
    values = fetch(load(tmp_path, "residual"), arrays)["residual"]
    blocks = []
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)
    for layer in layers:
        layer.register_forward_hook(lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out))
    for row, length in enumerate(LENGTHS):
        blocks.clear()
        hidden_states(model, arrays.tokens[row, :length])
        for layer, wanted in enumerate(blocks):
            assert worst_token(values[layer, row, :length], wanted[0].detach().numpy()) < 1e-5


def test_rotary_angles_that_depend_on_the_longest_row_give_each_row_its_own(tmp_path):
    """Dynamic NTK scaling: rows of 9 to 14 tokens where the model was trained on 8, in any order and twice."""
    model, arrays = tiny_model("llama_dynamic"), batch()
    model.save_pretrained(tmp_path)
    step = load(tmp_path, "residual")
    first = fetch(step, arrays)["residual"]
    np.testing.assert_array_equal(fetch(step, arrays)["residual"], first)
    for row, length in enumerate(LENGTHS):
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        states = hidden_states(fresh, arrays.tokens[row, :length])
        assert worst_token(first[1, row, :length], states[2]) < 1e-5


def test_missing_weights_are_an_error_and_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny("stablelm", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"1 weights are missing or have the wrong shape, model.layers.1.mlp.up_proj.weight first"
    ):
        load(tmp_path, "residual")


class _LeavesAMark:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return type(self.mark).touch, (self.mark,)


def test_a_pickle_of_weights_is_read_and_runs_nothing(tmp_path):
    model, arrays = tiny_model("opt"), batch()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    values = fetch(load(tmp_path, "residual"), arrays)["residual"]
    wanted = hidden_states(model, arrays.tokens[0, : LENGTHS[0]])[1]
    assert worst_token(values[0, 0, : LENGTHS[0]], wanted) < 1e-5
    torch.save(model.state_dict() | {"x": _LeavesAMark(tmp_path / "mark")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="transformers cannot load it"):
        load(tmp_path, "residual")
    assert not (tmp_path / "mark").exists()


def write_model_with_code(folder):
    """A model whose config names a class in a file beside it; the file leaves a mark when it runs."""
    save_tiny("stablelm", folder)
    (folder / "own_code.py").write_text(
        "from pathlib import Path\n"
        f"Path({str(folder / 'mark')!r}).touch()\n"
        "from transformers import StableLmConfig, StableLmForCausalLM\n"
        "class OwnConfig(StableLmConfig):\n    model_type = 'own'\n"
        "class OwnModel(StableLmForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own",
        "architectures": ["OwnModel"],
        "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_that_a_model_brings_runs_only_when_trusted(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = write_model_with_code(tmp_path / "model")
    with pytest.raises(ModelError, match="--trust_remote_code"):
        TorchBackend().model_shape(str(folder), None)
    with pytest.raises(ModelError, match="--trust_remote_code"):
        load(folder, "residual")
    assert not (folder / "mark").exists()
    trusting = TorchBackend(trust_remote_code=True)
    assert trusting.model_shape(str(folder), None).n_layers == N_LAYERS
    assert (folder / "mark").exists()
    # The code is part of what the model is.
    digest = trusting.model_digest(str(folder), None)
    (folder / "own_code.py").write_text((folder / "own_code.py").read_text() + "# changed\n")
    assert trusting.model_digest(str(folder), None) != digest


def test_every_site_a_shape_promises_has_the_width_that_is_found(tmp_path):
    for name in CONFIGS:
        folder = save_tiny(name, tmp_path / name)
        shape = TorchBackend().model_shape(str(folder), None)
        sites = [site for site in shape.site_widths if site not in ("attn_proj", "mlp_proj")]
        sites = [site for site in sites if (name, site) != ("bloom", "embedding")]
        if "parallel" in name or name in ("gptj", "cohere", "falcon_multi_query", "falcon_grouped"):
            sites.remove("resid_mid")
        values = fetch(load(folder, *sites), batch())
        assert {site: array.shape[-1] for site, array in values.items()} == {s: shape.site_widths[s] for s in sites}


def test_odd_models_are_described_before_their_weights_are_there(tmp_path):
    for name in ODD_CONFIGS:
        shape = TorchBackend().model_shape(str(save_tiny(name, tmp_path / name)), None)
        assert (shape.n_layers, shape.d_model, shape.vocab_size) == (N_LAYERS, WIDTH, VOCAB)
