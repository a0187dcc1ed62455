"""The rules of --drop, and what they are by default."""

from collections.abc import Iterable
from typing import Any

from core.reading.dropping import FIRST, Dropping, Rule, dropping

KEEP_ALL = "none"
DEFAULT_RULES: tuple[Rule, ...] = (FIRST,)
"""A run stores no tokenizer. Position 0 is where tokenizers put BOS; without a BOS its token is the attention sink."""


def drop_rules(drop: Rule | Iterable[Rule] | None, tokenizer: str | None = None) -> Dropping:
    """The rules that were asked for; None: `DEFAULT_RULES`, and BOS wherever it stands if there is a tokenizer.

    drop: see `core.reading.dropping.dropping`, and `none`. Texts of digits are token ids.
    tokenizer: a model folder or hub id. Raises UsageError.
    """
    if drop is None:
        rules: list[Rule] = [*DEFAULT_RULES, *(["bos"] if tokenizer else [])]
    else:
        rules = [drop] if isinstance(drop, str | int) else list(drop)
    rules = [int(rule) if isinstance(rule, str) and rule.isdecimal() else rule for rule in rules if rule != KEEP_ALL]
    return dropping(rules, None if tokenizer is None else _loaded(tokenizer))


def _loaded(tokenizer: str) -> Any:
    from qwen2_jax import load_tokenizer

    return load_tokenizer(tokenizer)
