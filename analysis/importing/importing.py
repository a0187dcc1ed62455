"""Windows of foreign samples, stored and committed by the same code as those of an extraction."""

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from analysis.importing.sources import ForeignSample, ForeignSource, SaeLensSource, VllmSource
from core.activation_storage import ActivationStorage
from core.base.canonical_json import canonical_json
from core.base.dtypes import DTYPES
from core.base.errors import RunError, UsageError
from core.commit.identity import RunIdentity, StreamIdentity
from core.commit.record import CommitRecord, StoredSite
from core.object_store import LocalStore, open_store
from core.samples.windows import StreamPlace, TokenizedSample, Window
from core.shards.encoding import ShardEncoder
from core.shards.formats import FORMATS, require_format
from core.shards.window_activations import WindowActivations

FOLDER = "tpu_0"
_SOURCES: dict[str, Callable[[Path, str], ForeignSource]] = {
    "vllm": lambda folder, site: VllmSource(folder),
    "sae_lens": SaeLensSource,
}


@dataclass(frozen=True)
class ImportReport:
    """What an output holds after an import. n_new: samples that this import stored."""

    output: str
    site: str
    layers: tuple[int, ...]
    dtype: str
    shards: int
    samples: int
    tokens: int
    n_new: int

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As text."""
        layers = ", ".join(map(str, self.layers))
        return [
            f"imported {self.site}, layers {layers}, {self.dtype}: {self.shards} shards, {self.samples} samples "
            f"({self.n_new} of them now), {self.tokens} tokens: {self.output}"
        ]


@dataclass(frozen=True)
class _Numbered:
    """A sample, as it is stored, and its values."""

    sample: TokenizedSample
    values: Shaped[np.ndarray, "L T D"]


def import_activations(
    source: str,
    kind: str,
    *,
    output: str,
    site: str = "residual",
    layers: tuple[int, ...] | None = None,
    shard_format: str = "safetensors",
    dtype: str | None = None,
    shard_bytes: int = 1 << 30,
) -> ImportReport:
    """Stores what another tool left in the folder `source`; continues an import that was interrupted.

    Args:
      kind: `vllm` or `sae_lens`.
      layers: their numbers in the order of the source; None: those that it names, or 0, 1, ….
      shard_bytes: of the values of a window, at least, except for the last one.

    Raises UsageError for what is not there or does not fit, RunError for damaged files or values that are not finite.
    """
    found, layers = _opened(source, kind, site, layers)
    dtype = dtype or found.dtype
    require_format(shard_format)
    if dtype not in FORMATS[shard_format].dtypes:
        raise UsageError(f"the format {shard_format} has no {dtype}: choose another format, or --dtype float16")
    identity = _identity(found, kind, site, layers, dtype, shard_format, shard_bytes)
    stream = StreamIdentity({"name": Path(source).name, "files": len(found.files)}, 0, 1, None)
    store = open_store(output)
    with tempfile.TemporaryDirectory(prefix="import_") as scratch:
        spool = store if isinstance(store, LocalStore) else LocalStore(scratch)
        storage = ActivationStorage(identity, stream, FOLDER, primary=store, spool=spool)
        earlier = storage.open()
        records = [*earlier, *_store_rest(storage, found, identity, layers, earlier)]
        if not records:
            raise UsageError(f"{source} holds no sample")
        storage.write_metadata()
    n_samples, n_tokens = (sum(getattr(record, name) for record in records) for name in ("n_samples", "n_tokens"))
    n_new = n_samples - sum(record.n_samples for record in earlier)
    return ImportReport(store.url, site, layers, dtype, len(records), n_samples, n_tokens, n_new)


def _opened(source: str, kind: str, site: str, layers: tuple[int, ...] | None) -> tuple[ForeignSource, tuple[int, ...]]:
    """The source, and the numbers of its layers."""
    if kind not in _SOURCES:
        raise UsageError(f"{kind!r} is no tool to import from: choose from {', '.join(_SOURCES)}")
    found = _SOURCES[kind](Path(source).expanduser(), site)
    layers = found.layers if layers is None else layers
    if len(layers) != len(found.layers) or len(set(layers)) != len(layers):
        raise UsageError(f"{source} has {len(found.layers)} layers: name as many different ones")
    return found, layers


def _identity(
    source: ForeignSource,
    kind: str,
    site: str,
    layers: tuple[int, ...],
    dtype: str,
    shard_format: str,
    shard_bytes: int,
) -> RunIdentity:
    return RunIdentity(
        model={
            "family": f"imported from {kind}",
            "digest": hashlib.sha256(canonical_json(source.files)).hexdigest(),
            "revision": None,
        },
        tokenizer=None,
        prompts={},
        sites=(site,),
        layers=layers,
        dtype=dtype,
        compute_dtype=source.dtype,
        format=shard_format,
        compress=FORMATS[shard_format].compressible,
        shard_bytes=shard_bytes,
        max_seq_length=np.iinfo(np.int32).max,
        overlong="refuse",
        backend=kind,
    )


def _store_rest(
    storage: ActivationStorage,
    source: ForeignSource,
    identity: RunIdentity,
    layers: tuple[int, ...],
    earlier: list[CommitRecord],
) -> Iterator[CommitRecord]:
    """Commits the windows after the earlier ones."""
    place = earlier[-1].next_place if earlier else StreamPlace(0, 0)
    if place is None:
        return
    fmt, index = FORMATS[identity.format], len(earlier) + 1
    with ThreadPoolExecutor() as threads:
        encoder = ShardEncoder(fmt, identity.compress, storage.spool, storage.folder, threads, syncs=True)
        for samples, next_place in _cut(_numbered(source, place.sample_idx, identity.dtype), identity.shard_bytes):
            window = Window(index, tuple(each.sample for each in samples), (), next_place)
            array = np.concatenate([each.values for each in samples], axis=1)
            (site,) = identity.sites
            activations = WindowActivations(window, {site: layers}, {site: array}, list(window.samples), 0)
            files = tuple(storage.store(index, file) for file in encoder.encode(activations))
            sites = {identity.sites[0]: StoredSite(layers, array.shape[2])}
            hashes = storage.plan_hash, storage.stream_hash
            yield storage.commit(CommitRecord.of_window(window, hashes, sites, identity.dtype, files))
            index += 1


def _numbered(source: ForeignSource, first: int, dtype: str) -> Iterator[_Numbered]:
    for number, foreign in enumerate(source.samples(first), first):
        values = _cast(foreign, dtype, number)
        preview = " ".join(map(str, foreign.labels.values()))[:200]
        n_tokens = len(foreign.token_ids)
        sample = TokenizedSample(number, number, 1, foreign.token_ids, n_tokens, preview, foreign.labels)
        yield _Numbered(sample, values)


def _cast(foreign: ForeignSample, dtype: str, number: int) -> Shaped[np.ndarray, "L T D"]:
    if not np.isfinite(foreign.values).all():
        raise RunError(f"sample {number} {foreign.labels or ''}: it has NaN or infinity")
    if foreign.values.dtype == DTYPES[dtype]:
        return foreign.values
    with np.errstate(over="ignore"):
        values = foreign.values.astype(np.float32).astype(DTYPES[dtype])
    if not np.isfinite(values).all():
        raise RunError(f"sample {number}: a value does not fit {dtype}: use --dtype float32")
    return values


def _cut(samples: Iterator[_Numbered], window_bytes: int) -> Iterator[tuple[list[_Numbered], StreamPlace | None]]:
    """Runs of samples that reach `window_bytes`, each with the place of the next one."""
    held: list[_Numbered] = []
    size = 0
    for each in samples:
        if size >= window_bytes:
            yield held, StreamPlace(each.sample.position, each.sample.sample_idx)
            held, size = [], 0
        held.append(each)
        size += each.values.nbytes
    if held:
        yield held, None
