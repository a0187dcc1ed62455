"""What others call the places that can be captured: TransformerLens' hooks, and Hugging Face's modules by their output.

A sandwich block has a norm after attention and after the MLP (Gemma-2, Gemma-3, OLMo-2). There the output of the
module `self_attn` is not yet what is added to the residual stream: it is our `attn_proj`, and the norm's output `attn`.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import product

from core.base.errors import ModelError
from qwen2_jax.taps import SITES


@dataclass(frozen=True)
class HookName:
    """A site by our name; layer None where the name carried none."""

    site: str
    layer: int | None


@dataclass(frozen=True)
class HookPoint:
    """sandwich: whether the path means this site in sandwich blocks alone, in others alone, or (None) in both."""

    path: str
    site: str
    sandwich: bool | None = None


@dataclass(frozen=True)
class Layout:
    """How a library or some families name their modules. prefixes: what may stand before a path, the usual one first.

    `{i}` is the layer. Of several points of one site the first is the one that is shown.
    """

    prefixes: tuple[str, ...]
    points: tuple[HookPoint, ...]


def _output(path: str, site: str) -> tuple[HookPoint, HookPoint]:
    """A module whose output is added to the residual stream, after a norm in sandwich blocks."""
    return HookPoint(path, site, sandwich=False), HookPoint(path, f"{site}_proj", sandwich=True)


_LENS_ONCE = Layout(("",), (HookPoint("hook_embed", "embedding"), HookPoint("ln_final.hook_normalized", "final_norm")))
_LENS = Layout(
    ("blocks.{i}.", ""),
    (
        HookPoint("hook_resid_pre", "resid_pre"),
        HookPoint("attn.hook_q", "q"),
        HookPoint("attn.hook_k", "k"),
        HookPoint("attn.hook_v", "v"),
        HookPoint("attn.hook_z", "attn_heads"),
        HookPoint("hook_attn_out", "attn"),
        HookPoint("hook_resid_mid", "resid_mid"),
        HookPoint("mlp.hook_post", "mlp_act"),
        HookPoint("hook_mlp_out", "mlp"),
        HookPoint("hook_resid_post", "residual"),
    ),
)
# As `transformer_lens.utils.get_act_name` takes them, where they are not our own names.
_LENS_SHORT = {
    "embed": "embedding",
    "z": "attn_heads",
    "attn_out": "attn",
    "post": "mlp_act",
    "mlp_post": "mlp_act",
    "mlp_out": "mlp",
    "resid_post": "residual",
}
_FUSED = Layout(
    ("model.", "model.language_model.", "language_model.model.", "language_model.", ""),
    (
        HookPoint("embed_tokens", "embedding"),
        *_output("layers.{i}.self_attn", "attn"),
        *_output("layers.{i}.self_attn.o_proj", "attn"),
        HookPoint("layers.{i}.post_attention_layernorm", "attn", sandwich=True),
        *_output("layers.{i}.mlp", "mlp"),
        *_output("layers.{i}.mlp.down_proj", "mlp"),
        HookPoint("layers.{i}.post_feedforward_layernorm", "mlp", sandwich=True),
        HookPoint("layers.{i}", "residual"),
        HookPoint("norm", "final_norm"),
    ),
)
_LLAMA = Layout(
    _FUSED.prefixes,
    (*_FUSED.points, *(HookPoint(f"layers.{{i}}.self_attn.{site}_proj", site) for site in ("q", "k", "v"))),
)
_MULTIMODAL = Layout(("model.language_model.",), _LLAMA.points)
_GPT_NEOX = Layout(
    ("gpt_neox.", ""),
    (
        HookPoint("embed_in", "embedding"),
        HookPoint("layers.{i}.attention", "attn"),
        HookPoint("layers.{i}.attention.dense", "attn"),
        HookPoint("layers.{i}.mlp.act", "mlp_act"),
        HookPoint("layers.{i}.mlp", "mlp"),
        HookPoint("layers.{i}.mlp.dense_4h_to_h", "mlp"),
        HookPoint("layers.{i}", "residual"),
        HookPoint("final_layer_norm", "final_norm"),
    ),
)
_GPT2 = Layout(
    ("transformer.", ""),
    (
        HookPoint("wte", "embedding"),
        HookPoint("h.{i}.attn", "attn"),
        HookPoint("h.{i}.attn.c_proj", "attn"),
        HookPoint("h.{i}.mlp.act", "mlp_act"),
        HookPoint("h.{i}.mlp", "mlp"),
        HookPoint("h.{i}.mlp.c_proj", "mlp"),
        HookPoint("h.{i}", "residual"),
        HookPoint("ln_f", "final_norm"),
    ),
)
_LAYOUTS = {"gemma3": _MULTIMODAL, "gpt2": _GPT2, "gpt_neox": _GPT_NEOX, "phi3": _FUSED}


def parse_hook_name(name: str, sites: Collection[str]) -> HookName:
    """What `name` means for a model that has `sites`: ours, TransformerLens' or that of a Hugging Face module.

    `{i}` may stand for the layer number, and TransformerLens' `blocks.{i}.` be left out; its short names, such as
    `resid_post`, are known too. Raises ModelError for a name that is none, and for a site that this model lacks.
    """
    hook = HookName(name, None) if name in SITES else _foreign(name, is_sandwich="attn_proj" in sites)
    if hook is None:
        raise ModelError(
            f"no site has this name: this model has {', '.join(sites)} "
            "(other accepted names: analyze_activations.py list-hooks MODEL)"
        )
    if hook.site not in sites:
        called = "" if hook.site == name else f", which is {hook.site}"
        raise ModelError(f"this model has no such site{called}: it has {', '.join(sites)}")
    return hook


def _foreign(name: str, *, is_sandwich: bool) -> HookName | None:
    if name in _LENS_SHORT:
        return HookName(_LENS_SHORT[name], None)
    for layout in (_LENS_ONCE, _LENS, _LLAMA, _GPT_NEOX, _GPT2):
        for prefix, point in product(layout.prefixes, layout.points):
            match = _pattern(prefix + point.path).fullmatch(name)
            if match is not None and point.sandwich in (None, is_sandwich):
                layer = match.groupdict().get("layer")
                return HookName(point.site, None if layer in (None, "{i}") else int(layer))
    return None


@cache
def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.escape(path).replace(re.escape("{i}"), r"(?P<layer>[0-9]{1,6}|\{i\})"))


def transformer_lens_name(site: str) -> str | None:
    """TransformerLens' name of a site, `{i}` for the layer; None where it has none."""
    return next(
        (_shown(layout, point) for layout in (_LENS_ONCE, _LENS) for point in layout.points if point.site == site), None
    )


def hugging_face_name(site: str, family: str, sites: Collection[str]) -> str | None:
    """The module of a model of this family, having `sites`, whose output the site is; None where there is none."""
    layout = _LAYOUTS.get(family, _LLAMA)
    is_sandwich = "attn_proj" in sites
    points = (point for point in layout.points if point.site == site and point.sandwich in (None, is_sandwich))
    return next((_shown(layout, point) for point in points), None)


def _shown(layout: Layout, point: HookPoint) -> str:
    return layout.prefixes[0] + point.path
