"""Finds the parts of a transformers model by its module tree alone, without weights or a forward pass.

Paths are dotted module names relative to the model, or to a decoder layer where documented.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from core.base.errors import ModelError

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_NORM = re.compile(r"norm|(^|_)ln(_|$)", re.IGNORECASE)


@dataclass(frozen=True)
class LinearSizes:
    """Widths of a linear map."""

    in_features: int
    out_features: int


def decoder_layers(model: nn.Module, n_layers: int) -> str:
    """The path of the list of decoder layers: the module list of that length with the most parameters.

    Raises ModelError when there is none.
    """
    lists = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    }
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of {n_layers} decoder layers: it cannot be captured")
    return max(lists, key=lambda name: lists[name])


def attention_of(layer: nn.Module) -> str | None:
    """The path of a decoder layer's attention: the outermost module with such a name except norms; None without one."""
    named = [
        name
        for name, module in layer.named_modules()
        if name and _ATTENTION.search(name.rpartition(".")[2]) and not is_norm(name, module) and any(module.children())
    ]
    return min(named, key=lambda name: name.count("."), default=None)


def is_norm(name: str, module: nn.Module) -> bool:
    """Whether a module is a norm, by its class or its name."""
    return bool(_NORM.search(type(module).__name__) or _NORM.search(name.rpartition(".")[2]))


def is_within(name: str, parent: str) -> bool:
    """Whether a path is `parent` or below it."""
    return name == parent or name.startswith(f"{parent}.")


def linear_sizes(module: nn.Module) -> LinearSizes | None:
    """The widths of a linear map of any class; None for other modules."""
    weight = getattr(module, "weight", None)
    # The weights of norms over single heads are matrices, too.
    if isinstance(module, nn.Embedding) or _NORM.search(type(module).__name__) or getattr(weight, "ndim", 0) != 2:
        return None
    assert weight is not None
    first, second = weight.shape
    # transformers' Conv1D, which GPT-2 is made of, keeps (in, out).
    return LinearSizes(first, second) if type(module).__name__ == "Conv1D" else LinearSizes(second, first)


def possible_widths(model: nn.Module, n_layers: int, d_model: int, n_heads: int) -> dict[str, int]:
    """Site -> width for each site that the model may have, by its modules.

    A forward pass decides which of them it has (`torch_models.probing`).
    """
    layer = model.get_submodule(decoder_layers(model, n_layers))[0]  # type: ignore[index]
    widths = dict.fromkeys(("embedding", "resid_pre", "residual", "final_norm"), d_model)
    attention = attention_of(layer)
    if attention is None:
        return widths
    widths |= dict.fromkeys(("attn", "resid_mid", "mlp"), d_model)
    projections = {name: sizes for name, module in layer.named_modules() if (sizes := linear_sizes(module))}
    inside = [sizes for name, sizes in projections.items() if is_within(name, attention)]
    outside = [sizes for name, sizes in projections.items() if not is_within(name, attention)]
    if sum(is_norm(name, module) for name, module in layer.named_modules()) >= 2:
        widths |= dict.fromkeys(("attn_proj", "mlp_proj"), d_model)
    down = [sizes.in_features for sizes in outside if sizes.out_features == d_model]
    if down:
        widths["mlp_act"] = down[-1]
    return widths | _head_widths(inside, d_model, n_heads)


def _head_widths(inside: list[LinearSizes], d_model: int, n_heads: int) -> dict[str, int]:
    """Widths of heads, queries, keys and values from the attention's projections: one or three, and the output."""
    output = [sizes.in_features for sizes in inside if sizes.out_features == d_model]
    if not output:
        return {}
    heads = output[-1]
    others = sorted((sizes.out_features for sizes in inside), reverse=True)
    others.remove(d_model)
    if len(others) == 3:
        kv = others[-1]
    elif len(others) == 1 and (others[0] - heads) % 2 == 0 and heads % n_heads == 0:
        kv = (others[0] - heads) // 2
    else:
        return {"attn_heads": heads}
    return {"q": heads, "k": kv, "v": kv, "attn_heads": heads}
