"""Removes secrets from text that is logged, printed or stored, and terminal control characters from printed text.

Errors of storage and hub libraries quote requests; names and errors in an output or a stream are untrusted.
"""

import logging
import os
import re

_MASK = "***"
_ENVIRONMENT = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")
_SHORTEST_SECRET = 8
_NAMES = (
    "upload_id|sig|signature|credential|token|secret|password|api_?key|access_?key|client_secret|"
    "(?:access|refresh|id|auth|security)_token|x-(?:goog|amz)-(?:signature|credential|security-token)"
)
_PATTERNS = (
    # user:password@ of a URL
    (re.compile(r"(?<=://)[^\s/@]+@"), f"{_MASK}@"),
    # The id of an upload session is enough to write into it; signed URLs are passwords, too.
    (re.compile(rf"(?i)\b((?:{_NAMES})=)[^\s&'\"]+"), rf"\1{_MASK}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{8,}"), rf"\1 {_MASK}"),
    (re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|ya29\.[\w.-]{8,}|AIza[\w-]{20,}|1//0[\w-]{20,})"), _MASK),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL), _MASK),
)


def redact(text: str) -> str:
    """The text with every recognizable secret replaced by `***`."""
    for name in _ENVIRONMENT:
        value = os.environ.get(name, "")
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, _MASK)
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return text


def printable(text: str, keep: str = "") -> str:
    """The text with every non-printable character, except those in `keep`, replaced by `?`."""
    return "".join(letter if letter.isprintable() or letter in keep else "?" for letter in text)


class RedactingFormatter(logging.Formatter):
    """Formats log records, including stack traces, without secrets and terminal control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """The formatted line."""
        return printable(redact(super().format(record)), keep="\n\t")
