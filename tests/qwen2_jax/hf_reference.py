"""Tiny random transformers models and what their modules saw: the oracle of the parity tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, PreTrainedConfig

from qwen2_jax import Capture, Decoder

SIZES = {"vocab_size": 97, "intermediate_size": 52, "num_hidden_layers": 4, "max_position_embeddings": 128}


def tiny_model(config: PreTrainedConfig, seed: int = 0) -> torch.nn.Module:
    """A model none of whose parameters are at a value (0, 1) that would hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    plus_one = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = name.endswith("weight") and parameter.ndim == 1
            parameter.normal_(1.0 if is_norm and not plus_one else 0.0, 0.1)
    return model


def save(model: torch.nn.Module, folder: Path, **edits: object) -> Path:
    """Save as a model folder; edits overwrite config.json's fields, None removes one."""
    model.save_pretrained(folder)
    if edits:
        path = folder / "config.json"
        fields = json.loads(path.read_text()) | edits
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return folder


@dataclass(frozen=True)
class Modules:
    """Where transformers has what the sites name, as paths inside the model and inside a layer.

    mid: what reads the residual stream between attention and MLP. attn, mlp: what puts out that which is added to it.
    fused: the projection to q, k and v, and how its output is cut; None where each has its own.
    """

    layers: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    o: str = "self_attn.o_proj"
    down: str = "mlp.down_proj"
    mid: str | None = "post_attention_layernorm"
    attn: str = "self_attn"
    mlp: str = "mlp"
    fused: tuple[str, Callable] | None = None


def _cut_by_head(config: PreTrainedConfig, fused: torch.Tensor) -> list[torch.Tensor]:
    by_head = fused.unflatten(-1, (config.num_attention_heads, 3, -1))
    return [by_head[..., part, :].flatten(-2) for part in range(3)]


def _cut_by_width(config: PreTrainedConfig, fused: torch.Tensor) -> tuple[torch.Tensor, ...]:
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = fused.shape[-1] // (heads + 2 * kv_heads)
    return fused.split([heads * size, kv_heads * size, kv_heads * size], dim=-1)


SANDWICH = Modules(mid="pre_feedforward_layernorm", attn="post_attention_layernorm", mlp="post_feedforward_layernorm")
MODULES = {
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "gemma3_text": SANDWICH,
    "olmo2": Modules(mid="mlp", attn="post_attention_layernorm", mlp="post_feedforward_layernorm"),
    "phi3": Modules(fused=("self_attn.qkv_proj", _cut_by_width)),
    "gpt2": Modules(
        layers="h",
        final_norm="ln_f",
        attention="attn",
        o="attn.c_proj",
        down="mlp.c_proj",
        mid="ln_2",
        attn="attn",
        fused=("attn.c_attn", _cut_by_width),
    ),
    "gpt_neox": Modules(
        final_norm="final_layer_norm",
        attention="attention",
        o="attention.dense",
        down="mlp.dense_4h_to_h",
        attn="attention",
        fused=("attention.query_key_value", _cut_by_head),
    ),
}


def hf_activations(model: torch.nn.Module, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Site -> (layers, B, T, width) as forward hooks saw them, and "logits" (B, T, V)."""
    seen: dict[str, list[torch.Tensor]] = {}
    hooks = []

    def output(module: torch.nn.Module, *sites: str, cut: Callable = lambda out: [out]) -> None:
        def keep(_, __, out):
            for site, part in zip(sites, cut(out[0] if isinstance(out, tuple) else out), strict=True):
                seen.setdefault(site, []).append(part)

        hooks.append(module.register_forward_hook(keep))

    def given(module: torch.nn.Module, site: str) -> None:
        hooks.append(module.register_forward_pre_hook(lambda _, args: seen.setdefault(site, []).append(args[0])))

    _hook(model, output, given)
    with torch.no_grad():
        logits = model(torch.asarray(tokens), use_cache=False).logits
    for hook in hooks:
        hook.remove()
    found = {site: torch.stack(arrays).float().numpy() for site, arrays in seen.items()}
    return found | {"logits": logits.float().numpy()}


def _hook(model: torch.nn.Module, output: Callable, given: Callable) -> None:
    text = getattr(model.base_model, "language_model", model.base_model)
    config, names = model.config.get_text_config(), MODULES.get(model.config.model_type, Modules())
    output(text.get_input_embeddings(), "embedding")
    output(text.get_submodule(names.final_norm), "final_norm")
    for layer in text.get_submodule(names.layers):
        at = layer.get_submodule
        given(layer, "resid_pre")
        output(layer, "residual")
        given(at(names.o), "attn_heads")
        given(at(names.down), "mlp_act")
        output(at(names.attn), "attn")
        output(at(names.mlp), "mlp")
        if names.attn != names.attention:
            output(at(names.attention), "attn_proj")
            output(layer.mlp, "mlp_proj")
        if not getattr(config, "use_parallel_residual", False):
            given(at(names.mid), "resid_mid")
        if names.fused is None:
            for site in ("q", "k", "v"):
                output(at(f"{names.attention}.{site}_proj"), site)
        else:
            fused, cut = names.fused
            output(at(fused), "q", "k", "v", cut=lambda out, cut=cut: cut(config, out))


def forward(
    decoder: Decoder, tokens: np.ndarray, capture: Capture, segment_ids=None, positions=None, *, optimised: bool = True
) -> dict:
    """The decoder under jit, one segment a row unless told otherwise. Compiles in half the time when not optimised."""
    graph, state = nnx.split(decoder)
    if segment_ids is None:
        segment_ids = np.ones_like(tokens)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    options = {} if optimised else {"xla_backend_optimization_level": 0}
    run = jax.jit(lambda state, *inputs: nnx.merge(graph, state).forward(*inputs, capture), compiler_options=options)
    return {site: np.asarray(array, np.float32) for site, array in run(state, tokens, segment_ids, positions).items()}


def everything(decoder: Decoder, *, logits: bool = True) -> Capture:
    """Every layer, every site the model has."""
    sites = tuple(site for site in decoder.config.site_widths if site != "final_norm" or decoder.final_norm)
    return Capture(tuple(range(decoder.config.n_layers)), sites, logits)


def worst_token(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative L2 distance of any token's vector."""
    assert ours.shape == theirs.shape
    return float((np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)).max())
