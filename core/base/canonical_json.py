"""Canonical JSON (equal values have equal bytes), sealed with a checksum or hashed."""

import hashlib
import json
from typing import Any

import google_crc32c

CHECKSUM = "checksum"
"""The field that holds an object's own crc32c."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and fixed spacing: equal values have equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def sealed_json(value: dict[str, Any]) -> bytes:
    """Canonical JSON of an object with its own crc32c added, so that any changed byte is detected."""
    return canonical_json(value | {CHECKSUM: f"{google_crc32c.value(canonical_json(value)):08x}"})


def read_sealed_json(data: bytes) -> dict[str, Any]:
    """The object that `sealed_json` wrote. Raises ValueError for anything that differs from it by a byte."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    value.pop(CHECKSUM, None)
    if sealed_json(value) != data:
        raise ValueError(f"its {CHECKSUM!r} is not that of its content: it was damaged or changed")
    return value


def content_hash(value: Any) -> str:
    """The first 16 hex digits of the sha256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:16]
