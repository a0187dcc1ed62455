"""Reads fields of a Hugging Face config.json, failing closed: what is not understood is refused by name.

Messages start with the field; whoever knows the file puts its name in front.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from core.base.errors import ModelError, UnsupportedError, reading

Fields = Mapping[str, Any]
T = TypeVar("T")

# Fields of config.json that have no part in the numbers of a forward pass, as transformers 4 and 5, the hub and
# training tools write them.
HARMLESS = frozenset(
    name
    for names in (
        # the file itself
        "model_type architectures auto_map dtype torch_dtype use_bfloat16 transformers_version tokenizer_class",
        "is_llama_config is_decoder unsloth_fixed unsloth_version custom_pipelines keys_to_ignore_at_inference",
        # training
        "initializer_range gradient_checkpointing attention_dropout attention_probs_dropout_prob attn_pdrop",
        "classifier_dropout dropout embd_pdrop embedding_dropout hidden_dropout hidden_dropout_prob resid_pdrop",
        # what is returned, and how it is computed
        "use_cache cache_implementation return_dict output_attentions output_hidden_states torchscript",
        "chunk_size_feed_forward tf_legacy_loss attn_implementation use_flash_attn output_past",
        # token ids, lengths that the tokenizer or generation keeps to, and generation
        "max_sequence_length model_max_length n_special predict_special_tokens",
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id forced_bos_token_id prefix",
        "forced_eos_token_id max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups",
        "num_return_sequences temperature top_k top_p typical_p diversity_penalty repetition_penalty length_penalty",
        "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids begin_suppress_tokens suppress_tokens",
        "output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty",
        # other tasks than language modelling
        "id2label label2id num_labels finetuning_task problem_type task_specific_params summary_activation",
        "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj",
    )
    for name in names.split()
)
# Harmless at these values alone.
NEUTRAL = {"pretraining_tp": 1, "full_attn_mod": 1, "interpolate_factor": 1, "is_causal": True}


class _Tracked(Mapping[str, Any]):
    """Fields that remember which of them were asked for."""

    def __init__(self, fields: Fields) -> None:
        self._fields = fields
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self._fields[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


def read_all(family_config: Callable[[Fields], T], fields: Fields) -> T:
    """What `family_config` makes of the fields. Raises `ModelError` naming a field that it did not look at.

    A field that states nothing (null, false, 0 or empty) need not be looked at, nor one that has no part in the numbers
    (`HARMLESS`, and names that begin with an underscore or "transformers"), or none at its value (`NEUTRAL`).
    """
    tracked = _Tracked(fields)
    config = family_config(tracked)
    for name in sorted(fields.keys() - tracked.asked - HARMLESS):
        value = fields[name]
        is_neutral = value in (None, NEUTRAL[name]) if name in NEUTRAL else not value
        if not is_neutral and not name.startswith(("_", "transformers")):
            raise UnsupportedError(
                f"{name} {value!r:.60} is not implemented for this model type; "
                f"remove the field if the model was trained without it"
            )
    return config


def without_effect(fields: Fields, *names: str) -> None:
    """Declares that these fields change nothing in this family, whatever they say."""
    for name in names:
        fields.get(name)


def read_config_json(folder: Path) -> dict[str, Any]:
    """The fields of `folder/config.json`. Raises `ModelError` when it is missing or is not a JSON object."""
    path = folder / "config.json"
    with reading(path):
        if not path.is_file():
            raise ModelError(f"{folder}: no config.json; a model is a Hugging Face folder, a hub id or a .gguf file")
        content = path.read_bytes()
    try:
        fields = json.loads(content.decode())
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ModelError(f"{path}: a JSON object is needed, found {type(fields).__name__}")
    stated = fields.get("quantization_config")
    if stated is not None:
        method = stated.get("quant_method", "unknown") if isinstance(stated, dict) else stated
        raise ModelError(
            f"{path}: quantization_config: {method} weights are not supported; use the unquantised checkpoint or a GGUF"
        )
    return fields


def require(fields: Fields, name: str) -> Any:
    """The value of a field that must be there and not null."""
    if fields.get(name) is None:
        raise ModelError(f"{name} is missing; add it as the model's authors state it")
    return fields[name]


def require_present(fields: Fields, *names: str) -> None:
    """Refuses a config without these fields: null says that there is no such thing, absence leaves it open."""
    for name in names:
        if name not in fields:
            raise ModelError(f"{name} is missing; add it as the model's authors state it, or as null if there is none")


def count(fields: Fields, name: str) -> int:
    """A field that must be there and be a positive integer."""
    value = require(fields, name)
    if type(value) is not int or value < 1:
        raise ModelError(f"{name} must be a positive integer, found {value!r}")
    return value


def number(fields: Fields, name: str) -> float:
    """A field that must be there and be a positive number that a float holds."""
    value = require(fields, name)
    # A bool is an int to Python; a long enough int overflows, and so is compared before it is converted.
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise ModelError(f"{name} must be a positive number, found {value!r:.40}")
    return float(value)


def flag(fields: Fields, name: str, default: bool = False) -> bool:
    """A field that must be true or false; `default` where it is absent or null."""
    value = fields.get(name)
    if value is not None and type(value) is not bool:
        raise ModelError(f"{name} must be true or false, found {value!r}")
    return default if value is None else value


def head_dim(fields: Fields, default: int | None = None) -> int:
    """`head_dim` when stated, else `default`, else hidden_size / num_attention_heads, which must then divide."""
    if fields.get("head_dim") is not None:
        return count(fields, "head_dim")
    return default or whole_quotient(fields, "hidden_size", "num_attention_heads")


def whole_quotient(fields: Fields, width: str, heads: str) -> int:
    """One field divided by another, which must divide it."""
    if count(fields, width) % count(fields, heads):
        raise ModelError(f"{width} {fields[width]} is not a multiple of {heads} {fields[heads]}")
    return fields[width] // fields[heads]


def choice(fields: Fields, name: str, allowed: Mapping[str, Any]) -> str:
    """A field whose value must be one of the names we implement."""
    value = require(fields, name)
    if not isinstance(value, str) or value not in allowed:
        kind = UnsupportedError if isinstance(value, str) else ModelError
        raise kind(f"{name} {value!r} is not supported; supported are {', '.join(allowed)}")
    return value


def object_field(fields: Fields, name: str) -> dict[str, Any]:
    """A field that holds fields of its own; empty where it is absent or null."""
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{name} must be a JSON object, found {value!r}")
    return value or {}


def optional_number(fields: Fields, name: str) -> float | None:
    """A positive number, or None where the field is absent or null."""
    return None if fields.get(name) is None else number(fields, name)


def optional_count(fields: Fields, name: str) -> int | None:
    """A positive integer, or None where the field is absent or null."""
    return None if fields.get(name) is None else count(fields, name)


def kv_heads(fields: Fields) -> int:
    """`num_key_value_heads`, which is `num_attention_heads` where it is absent or null."""
    return optional_count(fields, "num_key_value_heads") or count(fields, "num_attention_heads")


def windows_by_type(
    fields: Fields, window: int | None, n_layers: int, *, switch: str = "sliding_window"
) -> tuple[int | None, ...] | None:
    """`layer_types` as one window or None a layer; None where the config has no `layer_types`.

    switch: the field that says that there are windows at all.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise ModelError(f"layer_types must be a JSON list, found {kinds!r}")
    if len(kinds) != n_layers:
        raise ModelError(f"layer_types has {len(kinds)} entries for {n_layers} layers")
    if unknown := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        raise UnsupportedError(f"layer type {unknown[0]!r} is not supported")
    if "sliding_attention" in kinds and window is None:
        raise ModelError(f"layer_types slides but {switch} is not set; make them agree")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
