"""stats.npz: arrays such as `residual/14/covariance`, written layer by layer; equal statistics have equal bytes.

`numpy.load` reads it. `{site}/{layer}/` has every array of `Moments.to_arrays` but `scatter`; in its place there are
`covariance` (scatter / (count - 1)) and `std`.
"""

import io
import json
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from analysis.moments import Moments
from core.base.errors import RunError, UsageError
from core.object_store.single_file import MissingFileError, create_result, read_file

ABOUT = "about.json"
_DDOF = 1
# What numpy and zipfile raise for bytes that are no archive of arrays.
_UNREADABLE = (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error)


class StatsWriter:
    """Adds one layer after another to a file that is being written."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive

    def add(self, site: str, layer: int, moments: Moments) -> None:
        """Writes the arrays of a layer."""
        arrays = moments.to_arrays() | moments.finish(_DDOF).to_arrays()
        del arrays["scatter"]
        for name, array in arrays.items():
            with self._archive.open(f"{site}/{layer}/{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


@contextmanager
def stats_writer(url: str, about: Mapping[str, Any]) -> Iterator[StatsWriter]:
    """A file that appears at `url`, a local path or any URL, when the block ends without an error.

    about: plain values, what the statistics are of. Raises UsageError if another file is there.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stats.npz")
        with zipfile.ZipFile(path, "w") as archive:
            yield StatsWriter(archive)
            with archive.open(f"{ABOUT}.npy", "w") as file:
                np.lib.format.write_array(file, np.array(json.dumps(about, sort_keys=True)), allow_pickle=False)
        create_result(url, path)


def require_own(url: str, about: Mapping[str, Any]) -> None:
    """Raises UsageError when a file at `url` is of something else: at the start, not after hours."""
    try:
        stored = json.loads(str(_opened(url)[f"{ABOUT}"]))
    except MissingFileError:
        return
    except _UNREADABLE:
        stored = None
    if stored != json.loads(json.dumps(about)):
        raise UsageError(f"{url} exists with other content: remove it, or choose another --output")


def read_stats(url: str, site: str | None, layer: int | None) -> Moments:
    """The moments of one layer; site and layer may be left out where there is one.

    The scatter is covariance * (count - 1), which may differ from the pass's in the last bit.
    Raises UsageError for a file that is missing, or is another one, or has no such layer.
    """
    try:
        file = _opened(url)
        prefix = _prefix(url, file.files, site, layer)
        return moments_of({name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)})
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{url}: it is no file of statistics ({reason})") from error


def moments_of(arrays: Mapping[str, np.ndarray]) -> Moments:
    """Of the arrays of a layer. Raises KeyError for one that is missing."""
    count = int(arrays["count"][0])
    return Moments.from_arrays({**arrays, "scatter": arrays["covariance"] * (count - _DDOF)})


def as_stored(moments: Moments) -> Moments:
    """The moments as `read_stats` gives them, so that what is made of either has the same bits."""
    if moments.count <= _DDOF:
        raise RunError(f"{moments.count} tokens: a covariance needs at least 2")
    return moments_of(moments.to_arrays() | {"covariance": moments.finish(_DDOF).covariance})


def _opened(url: str) -> Any:
    """Numpy's reader of an archive; reads arrays when they are asked for."""
    file = np.load(io.BytesIO(read_file(url)), allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("it is one array")
    return file


def _prefix(url: str, names: Iterable[str], site: str | None, layer: int | None) -> str:
    found = sorted({name.rpartition("/")[0] for name in names if name.count("/") >= 2})
    fitting = [
        each
        for each in found
        if site in (None, each.rpartition("/")[0]) and (layer is None or each.endswith(f"/{layer}"))
    ]
    if len(fitting) == 1:
        return f"{fitting[0]}/"
    wanted = f"layer {'any' if layer is None else layer} of {site or 'any site'}"
    what = "is there more than once" if fitting else "is not in it"
    raise UsageError(f"{url}: {wanted} {what}: it has {', '.join(found) or 'no layer'}")
