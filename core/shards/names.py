"""How the files of a window are named."""

from collections.abc import Sequence


def shard_stem(window: int) -> str:
    """`shard_0001` for window 1."""
    return f"shard_{window:04d}"


def table_name(window: int, part: int | None = None) -> str:
    """The name of the sample table of a window, or of a part of it."""
    return f"samples_{window:04d}{_of_part(part)}.jsonl.gz"


def site_file_name(window: int, site: str, sites: Sequence[str], suffix: str, part: int | None = None) -> str:
    """Where one site's file of a window lies in the worker's folder: in a folder of its own when there are several."""
    name = f"{shard_stem(window)}{_of_part(part)}{suffix}"
    return name if len(sites) == 1 else f"{site}/{name}"


def _of_part(part: int | None) -> str:
    return "" if part is None else f"_part_{part}"
