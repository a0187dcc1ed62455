"""The commit record of a window: its files, their names, and their contents' counts and shapes."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from core.base.canonical_json import read_sealed_json, sealed_json
from core.base.dtypes import ARRAY_DTYPES, CODE_DTYPES, DTYPES
from core.base.json_types import NONE, Kinds, require_all, require_types
from core.reduce.losses import Losses, is_losses
from core.samples.windows import StreamPlace, Window

RECORD_NAME = re.compile(r"shard_([0-9]{4,})\.json")
# Names in a record are untrusted, and become paths.
_FILE_NAME = re.compile(r"(?:[a-z][a-z0-9_]*/)?(?:shard|samples)_([0-9]{4,})(?:_part_([0-9]{1,6}))?(?:\.[a-z0-9_]+)+")


@dataclass(frozen=True)
class StoredFile:
    """A file listed in a commit record; `name` is relative to the worker's folder, `site` None for the sample table."""

    name: str
    site: str | None
    bytes: int
    crc32c: str
    sha256: str

    @property
    def part(self) -> int:
        """The index of its part of the window; file names of windows in one part have none."""
        match = _FILE_NAME.fullmatch(self.name)
        return int(match[2] or 0) if match is not None else 0


@dataclass(frozen=True)
class PartCounts:
    """The counts of one part of a window; first and last `sample_idx` are None where it has no sample."""

    first_sample_idx: int | None
    last_sample_idx: int | None
    n_samples: int
    n_tokens: int


@dataclass(frozen=True)
class StoredPart:
    """A part of a window that is stored but not committed.

    number: index of the part; None where a host had none to compute. n_dropped, n_empty: as in `CommitRecord`.
    """

    number: int | None
    counts: PartCounts
    n_dropped: dict[str, int]
    n_empty: int
    n_rows: int
    files: tuple[StoredFile, ...]
    losses: Losses

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "StoredPart":
        """From the JSON of `dataclasses.asdict`."""
        files = tuple(StoredFile(**file) for file in fields["files"])
        return cls(**fields | {"files": files, "counts": PartCounts(**fields["counts"])})


@dataclass(frozen=True)
class StoredSite:
    """The arrays of a site: one of shape (rows, width) for each of `layers`, in this order.

    Attributes:
      arrays: for reduced rows, the arrays of the site by name, each with its width and dtype.
      block: for quantized rows, how many values share a scale; 0: all of them.
    """

    layers: tuple[int, ...]
    width: int
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    block: int | None = None


_FILE: Kinds = {"name": (str,), "site": (str, NONE), "bytes": (int,), "crc32c": (str,), "sha256": (str,)}
_PLACE: Kinds = {"position": (int,), "sample_idx": (int,)}
_SITE: Kinds = {"layers": (list,), "width": (int,)}
_PART: Kinds = {
    **dict.fromkeys(("first_sample_idx", "last_sample_idx"), (int, NONE)),
    **dict.fromkeys(("n_samples", "n_tokens"), (int,)),
}
_ARRAYS: Kinds = {"arrays": (dict,), "block": (int, NONE)}
_COUNTS = ("n_samples", "n_tokens", "n_truncated", "n_empty")
# Omitted from records where they are empty.
_OPTIONAL = {"parts", "pools", "losses", "arrays", "block"}
_RECORD: Kinds = {
    **dict.fromkeys(("window", "first_sample_idx", "last_sample_idx", "samples_per_record", *_COUNTS), (int,)),
    **dict.fromkeys(("plan_hash", "stream_hash", "dtype"), (str,)),
    "next_place": (dict, NONE),
    "n_dropped": (dict,),
    "sites": (dict,),
    "files": (list,),
    "bad_records": (list,),
}


@dataclass(frozen=True)
class CommitRecord:
    """The record of one committed window. It has no time and no writer, so that the same window has the same bytes.

    Attributes:
      next_place: where the next window begins; None when the stream ends with this one.
      n_tokens: stored tokens; n_dropped: by reason, the other tokens that the model saw (`core.samples.selection`).
      n_empty: samples without a stored token.
      pools: the vectors that are stored of a sample instead of its tokens; empty: a row for each token.
      losses: the losses of the reduction, see `core.reduce.losses.Losses`.
      samples_per_record: samples of each record of the stream; `sample_idx` = position × samples_per_record +
        prediction.
      parts: the counts of each part of the window; empty, and not stored, where the window is one part.
    """

    window: int
    plan_hash: str
    stream_hash: str
    first_sample_idx: int
    last_sample_idx: int
    next_place: StreamPlace | None
    n_samples: int
    n_tokens: int
    n_truncated: int
    n_dropped: dict[str, int]
    n_empty: int
    samples_per_record: int
    sites: dict[str, StoredSite]
    dtype: str
    files: tuple[StoredFile, ...]
    bad_records: tuple[dict[str, Any], ...] = field(default=())
    pools: tuple[str, ...] = ()
    losses: Losses = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """The number of rows of each stored array."""
        return (self.n_samples - self.n_empty) * len(self.pools) if self.pools else self.n_tokens

    parts: tuple[PartCounts, ...] = field(default=())

    @classmethod
    def empty(cls, plan_hash: str, stream_hash: str, dtype: str) -> "CommitRecord":
        """The record of a folder without samples: its machine's share of a short stream is empty."""
        zeros: dict[str, Any] = dict.fromkeys((*_COUNTS, "first_sample_idx"), 0)
        return cls(
            window=1,
            plan_hash=plan_hash,
            stream_hash=stream_hash,
            last_sample_idx=-1,
            next_place=None,
            n_dropped={},
            samples_per_record=1,
            sites={},
            dtype=dtype,
            files=(),
            **zeros,
        )

    @classmethod
    def of_window(
        cls,
        window: Window,
        hashes: tuple[str, str],
        sites: dict[str, StoredSite],
        dtype: str,
        files: tuple[StoredFile, ...],
        **more: Any,
    ) -> "CommitRecord":
        """The record of a window whose samples are all at hand.

        hashes: of the run's identity and of the stream. more: further fields, and in place of what the samples say.
        """
        plan_hash, stream_hash = hashes
        fields: dict[str, Any] = {
            "window": window.index,
            "plan_hash": plan_hash,
            "stream_hash": stream_hash,
            "first_sample_idx": window.samples[0].sample_idx,
            "last_sample_idx": window.samples[-1].sample_idx,
            "next_place": window.next_place,
            "n_samples": len(window.samples),
            "n_tokens": window.n_stored,
            "n_truncated": sum(sample.full_length > len(sample.token_ids) for sample in window.samples),
            "n_dropped": {},
            "n_empty": sum(sample.n_stored == 0 for sample in window.samples),
            "samples_per_record": window.samples_per_record,
            "sites": sites,
            "dtype": dtype,
            "files": files,
            "bad_records": tuple(asdict(bad) for bad in window.bad_records),
        }
        return cls(**fields | more)

    def files_of_parts(self) -> Iterator[tuple[PartCounts, list[StoredFile]]]:
        """The parts of the window in the order of their samples, each with its files, the sample table first."""
        whole = PartCounts(self.first_sample_idx, self.last_sample_idx, self.n_samples, self.n_tokens)
        for part, counts in enumerate(self.parts or [whole]):
            files = [file for file in self.files if file.part == part]
            yield counts, sorted(files, key=lambda file: file.site is not None)

    @property
    def n_seen(self) -> int:
        """Tokens that the model saw."""
        return self.n_tokens + sum(self.n_dropped.values())

    def to_bytes(self) -> bytes:
        """The record as stored, with its own checksum; empty optional fields are omitted."""
        fields = asdict(self)
        for holder in (fields, *fields["sites"].values()):
            for name in _OPTIONAL & holder.keys():
                if holder[name] in ((), {}, None):
                    del holder[name]
        return sealed_json(fields)

    @classmethod
    def from_bytes(cls, data: bytes) -> "CommitRecord":
        """Reads a stored record; raises ValueError when it was changed, or a field is missing or invalid."""
        try:
            fields = read_sealed_json(data)
            _check_record(fields)
            if fields["next_place"] is not None:
                fields["next_place"] = StreamPlace(**fields["next_place"])
            fields["files"] = tuple(StoredFile(**file) for file in fields["files"])
            fields["sites"] = {
                name: StoredSite(**site | {"layers": tuple(site["layers"])}) for name, site in fields["sites"].items()
            }
            fields["bad_records"] = tuple(fields["bad_records"])
            fields["parts"] = tuple(PartCounts(**part) for part in fields.get("parts", ()))
            fields["pools"] = tuple(fields.get("pools", ()))
            return cls(**fields)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a commit record: {error}") from error


def _check_record(fields: Any) -> None:
    require_types(fields, _RECORD)
    if fields["next_place"] is not None:
        require_types(fields["next_place"], _PLACE, "next_place.")
    for file in fields["files"]:
        require_types(file, _FILE, "files.")
        match = _FILE_NAME.fullmatch(file["name"])
        if match is None or int(match[1]) != fields["window"]:
            raise ValueError(f"'files.name' is {file['name']!r}, not a file of window {fields['window']}")
    for bad in fields["bad_records"]:
        require_types(bad, {"position": (int,)}, "bad_records.")
    for name, site in fields["sites"].items():
        require_types(site, _SITE, f"sites.{name}.")
        require_all(site["layers"], int, f"sites.{name}.layers")
        _check_arrays(site, name)
    require_all(fields.get("pools", []), str, "pools")
    if not is_losses(fields.get("losses", {})):
        raise ValueError("'losses' are not numbers by site and layer")
    require_types(fields["n_dropped"], dict.fromkeys(fields["n_dropped"], (int,)), "n_dropped.")
    is_coded = any(site.get("arrays") for site in fields["sites"].values())
    dtypes = DTYPES | CODE_DTYPES if is_coded or not fields["sites"] else DTYPES
    negative = [name for name in _COUNTS if fields[name] < 0]
    if negative or fields["samples_per_record"] < 1 or fields["dtype"] not in dtypes:
        name = [*negative, "samples_per_record" if fields["samples_per_record"] < 1 else "dtype"][0]
        raise ValueError(f"{name!r} is {fields[name]!r}, which is not valid")
    if {file["site"] for file in fields["files"]} - {None} != fields["sites"].keys():
        raise ValueError("'sites' are not those of its files")
    if "parts" in fields:
        _check_parts(fields)


def _check_parts(fields: dict[str, Any]) -> None:
    require_all(fields["parts"], dict, "parts")
    for part in fields["parts"]:
        require_types(part, _PART, "parts.")
    for count in ("n_samples", "n_tokens"):
        if sum(part[count] for part in fields["parts"]) != fields[count]:
            raise ValueError(f"the 'parts' do not add up to {count!r}")
    sites = [None, *fields["sites"]]
    for index, part in enumerate(fields["parts"]):
        found = [file["site"] for file in fields["files"] if StoredFile(**file).part == index]
        if sorted(found, key=str) != (sorted(sites, key=str) if part["n_samples"] else []):
            raise ValueError(f"the files of part {index} are not one for each site and a sample table")
    if any(StoredFile(**file).part >= len(fields["parts"]) for file in fields["files"]):
        raise ValueError("a file belongs to none of the 'parts'")


def _check_arrays(site: dict[str, Any], name: str) -> None:
    arrays = site.get("arrays", {})
    require_types(site | {"arrays": arrays, "block": site.get("block")}, _ARRAYS, f"sites.{name}.")
    for array, described in arrays.items():
        require_types(described, {"width": (int,), "dtype": (str,)}, f"sites.{name}.arrays.{array}.")
        if described["dtype"] not in ARRAY_DTYPES:
            raise ValueError(f"'sites.{name}.arrays.{array}.dtype' is {described['dtype']!r}, which is not valid")
