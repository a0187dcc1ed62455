"""Plain http to storage is allowed on the loopback interface only, where it cannot be intercepted."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

from core.base.errors import ModelError


def is_loopback(host: str) -> bool:
    """Whether a host name refers to this machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def emulator_url() -> str | None:
    """The emulator of Google Cloud Storage that STORAGE_EMULATOR_HOST names; None: Google's service.

    Raises ModelError for one that is reached over a network by plain http.
    """
    host = os.environ.get("STORAGE_EMULATOR_HOST", "")
    if host in ("", "default"):
        return None
    url = host if "://" in host else f"http://{host}"
    parts = urlsplit(url)
    if parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        return url.rstrip("/")
    raise ModelError(f"STORAGE_EMULATOR_HOST={host}: plain http is for loopback only; use https or 127.0.0.1")
