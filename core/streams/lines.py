"""Parses and checks the lines of a stream: JSON objects whose keys determine the kind of sample.

A line is an ARC task (`train` and `test`, or the `examples` pairs of Hugging Face datasets), `{"text": ...}`,
`{"messages": [...]}` or `{"input_ids": [...]}`. `task_id` names it; every other key is a label that is stored with the
sample. Any problem with a line is a ValueError whose message describes it.
"""

import json
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from arc24.tasks import validate_task

Kind = Literal["arc", "text", "messages", "input_ids"]

_BLANK = "blank line: remove it, or make it a sample"


class Content(NamedTuple):
    """The sample in a JSON object."""

    kind: Kind
    payload: Any
    task_id: str | None
    labels: dict[str, Any]


def parse_json_line(raw: bytes) -> dict[str, Any]:
    """The JSON object on one line. Raises ValueError describing the problem."""
    if not raw.strip():
        raise ValueError(_BLANK)
    try:
        text = raw.rstrip().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}") from None
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_float)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a surrogate pair, which no encoding can write") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"a line is a JSON object, not {_json_type(value)}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"broken JSON: {name} is not a JSON value")


def _finite_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def kind_of(value: dict[str, Any]) -> Kind:
    """The kind of sample of an object, by its keys. Raises ValueError if no kind or several kinds match."""
    found: list[tuple[Kind, str]] = []
    if "train" in value and "test" in value:
        found.append(("arc", "train"))
    if "examples" in value:
        found.append(("arc", "examples"))
    found += [(kind, kind) for kind in ("text", "messages", "input_ids") if kind in value]
    if len(found) > 1:
        raise ValueError(f"the keys {' and '.join(repr(key) for _, key in found)} name more than one sample")
    if found:
        return found[0][0]
    if "train" in value or "test" in value:
        missing = "test" if "train" in value else "train"
        raise ValueError(f"the task has no {missing!r}")
    known = "'train' and 'test', 'examples', 'text', 'messages' or 'input_ids'"
    raise ValueError(f"no sample: expected {known}, found {', '.join(map(repr, value)) or 'no keys'}"[:300])


def parse_object(value: dict[str, Any]) -> Content:
    """The sample in an object. Raises ValueError describing the problem."""
    kind = kind_of(value)
    labels = dict(value)
    task_id = _task_id(labels.pop("task_id", None))
    if kind != "arc":
        payload = labels.pop(kind)
        _VALIDATORS[kind](payload)
    else:
        payload = (
            task_from_pairs(labels.pop("examples"))
            if "examples" in labels
            else {part: labels.pop(part) for part in ("train", "test")}
        )
        validate_task(payload)
    return Content(kind, payload, task_id, labels)


def _task_id(value: Any) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if type(value) is int:
        return str(value)
    raise ValueError(f"task_id is a non-empty text or a whole number, not {json.dumps(value)[:40]}")


def task_from_pairs(pairs: Any) -> dict[str, Any]:
    """The ARC task of a list of [input, output] pairs, or of such objects: the last pair is the test.

    Grids are not checked. Raises ValueError if there are fewer than two pairs.
    """
    if not isinstance(pairs, list):
        raise ValueError(f"'examples' is a list of [input, output] pairs, not {_json_type(pairs)}")
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} [input, output] pairs: a task needs at least 2, of which the last is the test")
    named = [_named_pair(pair, index) for index, pair in enumerate(pairs)]
    return {"train": named[:-1], "test": named[-1:]}


def _named_pair(pair: Any, index: int) -> dict[str, Any]:
    if isinstance(pair, dict):
        return pair
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError(f"pair {index} is not an [input, output] pair")
    return {"input": pair[0], "output": pair[1]}


def _validate_text(text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"'text' is a text, not {_json_type(text)}")
    if not text:
        raise ValueError("'text' is empty")


def _validate_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is a non-empty list of objects with 'role' and 'content'")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is an object with 'role' and 'content', not {_json_type(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"messages[{index}] needs a text as its {key!r}")


def _validate_input_ids(ids: Any) -> None:
    if not isinstance(ids, list) or not ids:
        raise ValueError("'input_ids' is a non-empty list of token ids")
    if set(map(type, ids)) != {int}:
        odd = next(token for token in ids if type(token) is not int)
        raise ValueError(f"'input_ids' holds {json.dumps(odd)[:40]}: token ids are whole numbers")
    if min(ids) < 0 or max(ids) >= 1 << 31:
        raise ValueError("'input_ids' holds a number outside 0..2147483647")


_VALIDATORS: dict[str, Callable[[Any], None]] = {
    "text": _validate_text,
    "messages": _validate_messages,
    "input_ids": _validate_input_ids,
}


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
