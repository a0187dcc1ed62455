"""The value of --mesh: how the devices of a host share the work. Imports nothing, for parsers."""

import re

EXPLICIT_MESH = re.compile(r"([1-9]\d*)x([1-9]\d*)")
"""DATAxMODEL: rows of devices that hold a copy of the model each, and the devices in a row."""


def is_mesh(text: str) -> bool:
    """Whether --mesh may be this."""
    return text in ("auto", "1d", "2d") or EXPLICIT_MESH.fullmatch(text) is not None
