"""In bfloat16 we round where transformers does, or less often: our error is no larger than its own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_reference import everything, forward, hf_activations, save, tiny_model
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qwen2_jax import linear, load_model
from qwen2_jax.activations import ACTIVATIONS, activate
from qwen2_jax.config import RopeConfig
from qwen2_jax.families import FAMILIES
from qwen2_jax.linear import Linear
from qwen2_jax.norms import Norm
from qwen2_jax.parameters import Parameters, ParamSpec
from qwen2_jax.rope import rotary_tables, rotate

VOCAB, D_MODEL, N_HEADS = 311, 96, 6
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (4, 64))
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": 128,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 16}
WINDOW = {"sliding_window": 17}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": D_MODEL, "n_layer": 4, "n_head": N_HEADS}
CASES = {
    "gemma": GemmaConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, **WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=5.0),
    "gemma3_text": Gemma3TextConfig(**GROUPED, **WINDOW, sliding_window_pattern=2, query_pre_attn_scalar=24),
    "gpt2": GPT2Config(**GPT2),
    "gpt2 scaled by layer": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
    "gpt_neox": GPTNeoXConfig(**SIZES),
    "gpt_neox sequential": GPTNeoXConfig(**SIZES, use_parallel_residual=False),
    "llama": LlamaConfig(**GROUPED),
    "llama biased": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**GROUPED, **WINDOW),
    "olmo2": Olmo2Config(**GROUPED),
    "phi3": Phi3Config(**GROUPED, **WINDOW, pad_token_id=0),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_our_error_is_no_larger_than_that_of_transformers_in_any_layer(config, tmp_path):
    # Weights that bfloat16 holds exactly, so that the error is that of computing alone.
    model = tiny_model(config).to(torch.bfloat16).float()
    exact = hf_activations(model, TOKENS)
    decoder = load_model(str(save(model, tmp_path)), dtype="bfloat16")
    theirs = hf_activations(model.to(torch.bfloat16), TOKENS)
    ours = forward(decoder, TOKENS, everything(decoder))
    assert decoder.embedding.dtype == "bfloat16"
    assert np.abs(ours["residual"] - exact["residual"]).max() > 1e-3  # it did compute in bfloat16
    for site in ours:
        for layer in range(len(exact[site]) if site != "logits" else 1):
            at = layer if site != "logits" else ...
            our_error, their_error = (np.linalg.norm(found[site][at] - exact[site][at]) for found in (ours, theirs))
            assert our_error <= 1.1 * their_error, (site, layer)


def test_the_cases_cover_every_text_family():
    assert {config.model_type for config in CASES.values()} == set(FAMILIES) - {"gemma3"}


NORMS = {
    "rms": LlamaRMSNorm(64, eps=1e-5),
    "rms_f32": Olmo2RMSNorm(64, eps=1e-5),
    "rms_plus_one": GemmaRMSNorm(64, eps=1e-5),
    "layer": torch.nn.LayerNorm(64, eps=1e-5),
}


@pytest.mark.parametrize(("kind", "reference"), NORMS.items(), ids=NORMS)
def test_each_norm_rounds_where_transformers_does(kind, reference):
    torch.manual_seed(0)
    x = 3 * torch.randn(1, 500, 64, dtype=torch.bfloat16) + 1
    for parameter in reference.parameters():
        parameter.data = torch.randn(64, dtype=torch.bfloat16)

    def as_jax(tensor):
        return jnp.asarray(tensor.detach().float().numpy(), jnp.bfloat16)

    weights = {name: as_jax(each) for name, each in reference.named_parameters()}
    specs = {name: ParamSpec(each.shape, ("embed",)) for name, each in weights.items()}
    ours = np.asarray(Norm(kind, 1e-5, Parameters(weights, specs))(as_jax(x)), np.float32)
    theirs = reference(x).detach().float().numpy()
    # A last bit of the float32 statistics tips the rounding of a value in ten thousand, no more.
    assert np.mean(ours != theirs) < 2e-4
    np.testing.assert_allclose(ours, theirs, rtol=2**-7, atol=1e-6)


def rounded(exact: jnp.ndarray) -> np.ndarray:
    return np.asarray(exact.astype(jnp.bfloat16), np.float32)


def test_rotation_activation_and_bias_round_once():
    x, weight, bias = (
        jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)
        for seed, shape in enumerate([(1, 50, 2, 64), (96, 64), (96,)])
    )
    x32 = x.astype(jnp.float32)
    positions = jnp.arange(50)[None]
    tables = rotary_tables(RopeConfig(1e4, 64), positions, jnp.ones_like(positions))
    np.testing.assert_array_equal(np.asarray(rotate(x, tables), np.float32), rounded(rotate(x32, tables)))
    for name, exact in ACTIVATIONS.items():
        np.testing.assert_array_equal(np.asarray(activate(name, x), np.float32), rounded(exact(x32)))
    specs = {"weight": ParamSpec(weight.shape, ("mlp", "embed")), "bias": ParamSpec(bias.shape, ("mlp",))}
    given = Parameters({"weight": weight, "bias": bias}, specs)
    row, row32 = x[:, :, 0], x32[:, :, 0]
    ours = np.asarray(Linear("BTD,FD->BTF", given)(row), np.float32)
    theirs = rounded(jnp.einsum("BTI,OI->BTO", row32, weight.astype(jnp.float32), precision="highest") + bias)
    assert np.mean(ours != theirs) < 1e-3


@pytest.mark.parametrize(("platform", "product"), [("cpu", "f32"), ("tpu", "bf16"), ("cuda", "bf16")])
def test_products_are_rounded_by_the_chip_except_on_cpu(platform, product):
    x, weight = jnp.ones((1, 4, 8), jnp.bfloat16), jnp.ones((16, 8), jnp.bfloat16)
    up = jax.jit(lambda x, weight: linear.product("BTD,FD->BTF", x, weight)).trace(x, weight)
    (dot,) = re.findall(r"dot_general.*-> tensor<1x4x16x(\w+)>", up.lower(lowering_platforms=(platform,)).as_text())
    assert dot == product
    assert up.out_info.dtype == jnp.bfloat16
