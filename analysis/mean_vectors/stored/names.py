"""The names of the files in a folder of mean vectors."""

import re

METADATA = "metadata.json"
ARRAYS = ("mean", "normalized", "standard_error")
"""The arrays in the file of a mean."""

_BATCH = re.compile(r"vectors_(short|long)/batch_(\d{3,})\.pkl")
_MEAN = re.compile(r"mean_vector_(short|long)\.pkl")


def batch_name(mode: str, number: int) -> str:
    """Such as `vectors_short/batch_000.pkl`."""
    return f"vectors_{mode}/batch_{number:03d}.pkl"


def mean_name(mode: str) -> str:
    """Such as `mean_vector_short.pkl`."""
    return f"mean_vector_{mode}.pkl"


def batch_number(name: str, mode: str) -> int | None:
    """The number of a batch of `mode`; None for the name of anything else."""
    found = _BATCH.fullmatch(name)
    return int(found[2]) if found and found[1] == mode and name == batch_name(mode, int(found[2])) else None


def is_ours(name: str) -> bool:
    """Whether a run writes files of this name."""
    return name == METADATA or bool(_BATCH.fullmatch(name) or _MEAN.fullmatch(name))
