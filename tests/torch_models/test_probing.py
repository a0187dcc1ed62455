"""The start check believes numbers, not names: models that are not what their modules are called."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch_families import N_LAYERS, VOCAB, tiny_model
from transformers.models.gptj import modeling_gptj
from transformers.models.stablelm import modeling_stablelm

from core.base.errors import ModelError
from torch_models.probing import find_taps, probe_batch
from torch_models.structure import decoder_layers


def taps_of(model):
    layers = decoder_layers(model, N_LAYERS)
    return find_taps(model, layers, N_LAYERS, n_heads=4, vocab_size=VOCAB, whole=True)


def sites(taps):
    return {site for site, _ in taps.found}


def test_the_probe_has_padding_and_no_token_twice_in_one_place():
    batch = probe_batch(VOCAB)
    assert batch.attention_mask.sum(1).tolist() == [7, 4]
    assert (batch.token_ids[0, :4] != batch.token_ids[1, :4]).all()
    assert batch.position_ids[1].tolist() == [0, 1, 2, 3, 0, 0, 0]


def test_exchanged_queries_and_keys_are_found_out(monkeypatch):
    rotate = modeling_stablelm.apply_rotary_pos_emb
    monkeypatch.setattr(
        modeling_stablelm, "apply_rotary_pos_emb", lambda q, k, *rest, **named: rotate(k, q, *rest, **named)
    )
    taps = taps_of(tiny_model("stablelm_parallel"))
    assert taps.missing["q"] == taps.missing["k"] == "changing the presumed q of the first token changes other tokens"
    assert {"v", "attn_heads"} <= sites(taps)


def test_what_a_later_module_scales_is_read_behind_it(monkeypatch):
    model = tiny_model("stablelm")
    monkeypatch.setattr(model.model.layers[1].dropout, "forward", lambda x: x * 1.01)
    taps = taps_of(model)
    assert taps.found["mlp", 0].module == "model.layers.0.mlp.down_proj"
    assert taps.found["mlp", 1].module == "model.layers.1.dropout"
    assert taps.missing == {"mlp_act": "layer 1: no single linear map outputs what the MLP adds"}
    # Layers that have the site keep it.
    assert {layer for site, layer in taps.found if site == "mlp_act"} == {0, 2}


def test_a_padded_row_that_sees_its_padding_makes_rows_run_alone(monkeypatch):
    assert not taps_of(tiny_model("gptj")).rows_alone
    seen = modeling_gptj.GPTJAttention._attn

    def without_mask(self, query, key, value, attention_mask=None):
        return seen(self, query, key, value, None)

    # Attention in both directions, padding included: a row alone is not what it is in a batch.
    monkeypatch.setattr(modeling_gptj.GPTJAttention, "_attn", without_mask)
    model = tiny_model("gptj")
    model.set_attn_implementation("eager")
    assert taps_of(model).rows_alone


def test_blocks_that_do_not_form_one_stream_are_refused():
    model = tiny_model("stablelm")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ModelError, match="the input of block 1 is not the output of block 0"):
        taps_of(model)


def test_a_model_without_a_list_of_its_blocks_is_refused():
    with pytest.raises(ModelError, match="has no list of 7 decoder layers"):
        decoder_layers(tiny_model("opt"), 7)


def test_the_heaviest_list_of_the_right_length_holds_the_blocks():
    model = tiny_model("mixtral")
    model.model.extra = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(N_LAYERS))
    assert decoder_layers(model, N_LAYERS) == "model.layers"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_site_of_a_sandwich_block_is_found(dtype):
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=52, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=10, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    taps = taps_of(AutoModelForCausalLM.from_config(config).to(dtype).eval())
    assert taps.missing == {}
    modules = {site: (tap.module, tap.of_input) for (site, layer), tap in taps.found.items() if layer == 0}
    assert modules["attn"] == ("model.layers.0.post_attention_layernorm", False)
    assert modules["attn_proj"] == ("model.layers.0.post_attention_layernorm", True)
    assert modules["mlp_proj"] == ("model.layers.0.post_feedforward_layernorm", True)
    assert modules["resid_mid"] == ("model.layers.0.pre_feedforward_layernorm", True)
    assert taps.found["embedding", -1] == taps.found["resid_pre", 0]
    assert taps.widths["q"] == taps.widths["attn_heads"] == 40
    assert taps.widths["k"] == taps.widths["v"] == 20


def test_fused_projections_are_cut_where_the_values_are():
    columns = {
        name: taps_of(tiny_model(name)).found["k", 0].columns
        for name in ("bloom", "mpt", "falcon_multi_query", "falcon_grouped")
    }
    found = {name: (part.groups, part.start, part.stop) for name, part in columns.items()}
    assert found == {
        "bloom": (4, 8, 16),
        "mpt": (1, 32, 64),
        "falcon_multi_query": (1, 32, 40),
        "falcon_grouped": (2, 16, 24),
    }


def test_probe_tokens_stay_in_the_vocabulary():
    assert int(np.asarray(probe_batch(5).token_ids).max()) < 5
