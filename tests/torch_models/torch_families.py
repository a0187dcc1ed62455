"""Tiny random models of families that qwen2_jax does not know, saved as transformers saves them."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    FalconConfig,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    MptConfig,
    OPTConfig,
    StableLmConfig,
)

VOCAB, WIDTH, N_LAYERS = 97, 32, 3
_OLD = {"vocab_size": VOCAB, "n_embd": WIDTH, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 64}
_NEW = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 52,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_FALCON = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "ffn_dim": 52,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Learned positions, ALiBi, rotary; sequential and parallel blocks; fused and separate projections; biases or none.
CONFIGS = {
    "opt": OPTConfig(**_OPT, **_TOKENS, word_embed_proj_dim=WIDTH),
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=N_LAYERS, n_head=4, **_TOKENS),
    "falcon_multi_query": FalconConfig(**_FALCON, **_TOKENS, multi_query=True, parallel_attn=True, alibi=False),
    "falcon_grouped": FalconConfig(**_FALCON, **_TOKENS, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_alibi": FalconConfig(**_FALCON, **_TOKENS, multi_query=False, parallel_attn=False, alibi=True, bias=True),
    "gptj": GPTJConfig(**_OLD, **_TOKENS, rotary_dim=4),
    "stablelm": StableLmConfig(**_NEW, **_TOKENS),
    "stablelm_parallel": StableLmConfig(**_NEW | {"num_key_value_heads": 4}, **_TOKENS, use_parallel_residual=True),
    "mpt": MptConfig(vocab_size=VOCAB, d_model=WIDTH, n_heads=4, n_layers=N_LAYERS, max_seq_len=64, **_TOKENS),
    "cohere": CohereConfig(**_NEW, **_TOKENS, use_qk_norm=True),
}
# Models of which something cannot be captured.
ODD_CONFIGS = {
    # Norms after each addition: nothing adds up to the residual stream. The embedding and the head are narrower.
    "opt_350m": OPTConfig(**_OPT, **_TOKENS, word_embed_proj_dim=16, do_layer_norm_before=False),
    "granite": GraniteConfig(**_NEW, **_TOKENS, residual_multiplier=0.22),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=N_LAYERS, **_TOKENS),
    "mixtral": MixtralConfig(**_NEW, **_TOKENS, num_local_experts=4),
    "llama_dynamic": LlamaConfig(
        **_NEW | {"max_position_embeddings": 8},
        **_TOKENS,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
}


def tiny_model(name: str, seed: int = 0):
    """A random model none of whose parameters is at a value (0, 1) that would hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config((CONFIGS | ODD_CONFIGS)[name]).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in parameter_name or "ln_" in parameter_name else 0.0, 0.15)
    return model


def save_tiny(name: str, folder: Path, seed: int = 0) -> Path:
    """`tiny_model` in the published format."""
    tiny_model(name, seed).save_pretrained(folder)
    return folder


def worst_token(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative L2 distance of any token's vector."""
    assert ours.shape == theirs.shape
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())
