"""Tiny random transformers models and what their modules saw: the oracle of the parity tests."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qwen2_jax import SITES, Capture, Decoder

SIZES = {"vocab_size": 97, "intermediate_size": 52, "num_hidden_layers": 4, "max_position_embeddings": 128}


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    """A model none of whose parameters are at a value (0, 1) that would hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return model


def save(model: torch.nn.Module, folder: Path, **edits: object) -> Path:
    """Save as a model folder; edits overwrite config.json's fields, None removes one."""
    model.save_pretrained(folder)
    if edits:
        path = folder / "config.json"
        fields = json.loads(path.read_text()) | edits
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return folder


def hf_activations(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Site -> (L, B, T, D) as forward hooks saw them, and "logits" (B, T, V)."""
    seen: dict[str, list[torch.Tensor]] = {site: [] for site in SITES}

    def keep(site, pick):
        return lambda _, args, out=None: seen[site].append(pick(args, out))

    first = lambda args, _: args[0]  # noqa: E731
    output = lambda _, out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    hooks = []
    for layer in model.model.layers:
        hooks.append(layer.register_forward_pre_hook(keep("resid_pre", first)))
        hooks.append(layer.post_attention_layernorm.register_forward_pre_hook(keep("resid_mid", first)))
        hooks.append(layer.self_attn.register_forward_hook(keep("attn", output)))
        hooks.append(layer.mlp.register_forward_hook(keep("mlp", output)))
        hooks.append(layer.register_forward_hook(keep("residual", output)))
    with torch.no_grad():
        logits = model(torch.asarray(tokens), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    found = {site: torch.stack(arrays).float().numpy() for site, arrays in seen.items()}
    return found | {"logits": logits.float().numpy()}


def forward(decoder: Decoder, tokens: np.ndarray, capture: Capture, segment_ids=None, positions=None) -> dict:
    """The decoder under jit, one segment a row unless told otherwise."""
    graph, state = nnx.split(decoder)
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    run = jax.jit(lambda state, *inputs: nnx.merge(graph, state)(*inputs, capture))
    return {site: np.asarray(array, np.float32) for site, array in run(state, tokens, segment_ids, positions).items()}


def everything(decoder: Decoder, *, logits: bool = True) -> Capture:
    """Every layer, every site."""
    return Capture(tuple(range(decoder.config.n_layers)), tuple(SITES), logits)


def worst_token(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative L2 distance of any token's vector."""
    assert ours.shape == theirs.shape
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())
