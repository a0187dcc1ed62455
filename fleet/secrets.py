"""Keeps secrets out of command lines, which appear in the process list and the log of every VM."""

import re
from collections.abc import Iterable

from core.base.errors import UsageError

_FORMS = {
    "a Hugging Face token": re.compile(r"hf_[A-Za-z0-9]{16,}"),
    "a Google access token": re.compile(r"ya29\.[A-Za-z0-9_-]{16,}"),
    "a Google API key": re.compile(r"AIza[A-Za-z0-9_-]{30,}"),
    "a GitHub token": re.compile(r"gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20,}"),
    "a private key": re.compile(r"-----BEGIN|\"private_key\""),
    "a password in a URL": re.compile(r"[a-z][a-z0-9+]*://[^/@\s]*:[^/@\s]+@"),
    "a token": re.compile(r"(?i)--?[a-z_-]*(?:token|password|secret|api_?key)=\S+"),
}


def refuse_secrets(arguments: Iterable[str]) -> None:
    """Raises UsageError, which does not repeat the text, when an argument looks like a secret."""
    for position, argument in enumerate(arguments, 1):
        for what, form in _FORMS.items():
            if form.search(argument):
                raise UsageError(
                    f"argument {position} looks like {what}, which every process on the TPU VM could read: keep it in "
                    "Secret Manager and name it with --secret_env VARIABLE=NAME_OF_THE_SECRET"
                )
