"""Names of three kinds for one place. The oracles are the libraries' own module trees."""

import pytest
from transformers import CONFIG_MAPPING

from core.base.errors import ModelError
from qwen2_jax.families import FAMILIES, decoder_config
from qwen2_jax.mapping.hook_names import HookName, hugging_face_name, parse_hook_name, transformer_lens_name
from qwen2_jax.taps import SITES


def sites_of(fields: dict) -> tuple[str, ...]:
    """The sites of the model that a config.json describes."""
    return tuple(decoder_config(fields).site_widths)


PLAIN, SANDWICH, PARALLEL = (sites_of(CONFIG_MAPPING[family]().to_dict()) for family in ("llama", "gemma2", "gpt_neox"))


@pytest.mark.parametrize("site", SITES)
def test_our_own_names_stand_for_themselves(site):
    assert parse_hook_name(site, tuple(SITES)) == HookName(site, None)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("hook_resid_pre", "resid_pre"),
        ("hook_resid_mid", "resid_mid"),
        ("hook_resid_post", "residual"),
        ("hook_attn_out", "attn"),
        ("hook_mlp_out", "mlp"),
        ("attn.hook_q", "q"),
        ("attn.hook_k", "k"),
        ("attn.hook_v", "v"),
        ("attn.hook_z", "attn_heads"),
        ("mlp.hook_post", "mlp_act"),
    ],
)
@pytest.mark.parametrize("sites", [PLAIN, SANDWICH])
def test_transformer_lens_names_mean_the_same_with_and_without_a_block_in_every_kind_of_block(name, site, sites):
    assert parse_hook_name(name, sites) == HookName(site, None)
    assert parse_hook_name(f"blocks.{{i}}.{name}", sites) == HookName(site, None)
    assert parse_hook_name(f"blocks.11.{name}", sites) == HookName(site, 11)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_post", "residual"),
        ("attn_out", "attn"),
        ("mlp_out", "mlp"),
        ("z", "attn_heads"),
        ("mlp_post", "mlp_act"),
        ("embed", "embedding"),
    ],
)
def test_short_names_of_transformer_lens_mean_what_its_hooks_do(name, site):
    for sites in (PLAIN, SANDWICH):
        assert parse_hook_name(name, sites) == HookName(site, None)
    assert name not in SITES


def test_what_is_there_once_has_no_layer():
    for name, site in (("hook_embed", "embedding"), ("ln_final.hook_normalized", "final_norm")):
        assert parse_hook_name(name, PLAIN) == HookName(site, None)
        with pytest.raises(ModelError):
            parse_hook_name(f"blocks.0.{name}", PLAIN)


@pytest.mark.parametrize(
    ("name", "plain", "sandwich"),
    [
        ("model.layers.3", "residual", "residual"),
        ("model.layers.3.self_attn", "attn", "attn_proj"),
        ("model.layers.3.self_attn.o_proj", "attn", "attn_proj"),
        ("model.layers.3.self_attn.q_proj", "q", "q"),
        ("model.layers.3.self_attn.k_proj", "k", "k"),
        ("model.layers.3.self_attn.v_proj", "v", "v"),
        ("model.layers.3.mlp", "mlp", "mlp_proj"),
        ("model.layers.3.mlp.down_proj", "mlp", "mlp_proj"),
        ("model.layers.3.post_attention_layernorm", None, "attn"),
        ("model.layers.3.post_feedforward_layernorm", None, "mlp"),
        ("layers.3.mlp", "mlp", "mlp_proj"),
        ("model.language_model.layers.3.mlp", "mlp", "mlp_proj"),
        ("gpt_neox.layers.3", "residual", "residual"),
        ("gpt_neox.layers.3.attention", "attn", "attn"),
        ("gpt_neox.layers.3.attention.dense", "attn", "attn"),
        ("gpt_neox.layers.3.mlp", "mlp", "mlp"),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h", "mlp", "mlp"),
        ("gpt_neox.layers.3.mlp.act", "mlp_act", "mlp_act"),
        ("transformer.h.3", "residual", "residual"),
        ("transformer.h.3.attn", "attn", "attn"),
        ("transformer.h.3.attn.c_proj", "attn", "attn"),
        ("transformer.h.3.mlp", "mlp", "mlp"),
        ("transformer.h.3.mlp.c_proj", "mlp", "mlp"),
    ],
)
def test_modules_of_transformers_are_their_output_which_a_sandwich_block_norms_before_it_adds_it(name, plain, sandwich):
    for sites, site in ((PLAIN, plain), (SANDWICH, sandwich)):
        if site is None:
            with pytest.raises(ModelError):
                parse_hook_name(name, sites)
        elif "model.language_model" not in name or sites is SANDWICH:
            assert parse_hook_name(name, sites) == HookName(site, 3)
            assert parse_hook_name(name.replace(".3", ".{i}"), sites) == HookName(site, None)


def test_modules_outside_of_the_blocks():
    for name in ("model.embed_tokens", "gpt_neox.embed_in", "transformer.wte", "wte"):
        assert parse_hook_name(name, PLAIN).site == "embedding"
    for name in ("model.norm", "gpt_neox.final_layer_norm", "transformer.ln_f", "ln_f"):
        assert parse_hook_name(name, PLAIN).site == "final_norm"


@pytest.mark.parametrize(
    "name", ["", "resid", "blocks.x.hook_resid_post", "model.layers.3.", "model.layers.-1", "h.1.attn.c_attn", "mlp.3"]
)
def test_another_name_is_refused_with_what_this_model_has(name):
    with pytest.raises(ModelError, match=r"no site has this name: this model has embedding, resid_pre, .*list-hooks"):
        parse_hook_name(name, PLAIN)


def test_a_site_that_the_model_lacks_is_refused_with_those_it_has():
    for name in ("resid_mid", "blocks.1.hook_resid_mid"):
        with pytest.raises(ModelError, match=r"has no such site.*: it has embedding, resid_pre, q, .*final_norm$"):
            parse_hook_name(name, PARALLEL)
    with pytest.raises(ModelError, match="which is resid_mid"):
        parse_hook_name("hook_resid_mid", PARALLEL)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_that_are_shown_are_understood_as_what_they_stand_for(family):
    sites = sites_of(CONFIG_MAPPING[family]().to_dict())
    for site in sites:
        for name in (transformer_lens_name(site), hugging_face_name(site, family, sites)):
            assert name is None or parse_hook_name(name, sites) == HookName(site, None)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_that_is_shown_is_one_of_the_model_in_transformers(family):
    torch = pytest.importorskip("torch")
    import transformers

    default = CONFIG_MAPPING[family]()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    if hasattr(default.get_text_config(), "num_key_value_heads"):
        sizes["num_key_value_heads"] = 2
    is_multimodal = default.get_text_config() is not default
    config = CONFIG_MAPPING[family](**{"text_config": sizes} if is_multimodal else sizes)
    with torch.device("meta"):
        modules = {name for name, _ in transformers.AutoModelForCausalLM.from_config(config).named_modules()}
    sites = sites_of(config.to_dict())
    shown = {site: hugging_face_name(site, family, sites) for site in sites}
    assert {path.replace("{i}", "0") for path in shown.values() if path is not None} <= modules
    assert {"embedding", "attn", "mlp", "residual", "final_norm"} <= {site for site, path in shown.items() if path}
