"""`whiten apply`: a layer, whitened, as chunks of padded samples and a metadata.json."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from analysis.passes import PartialStore, run_pass
from analysis.stats import PassOptions, about_of
from analysis.whitened.apply_pass import ApplyPass
from analysis.whitened.chunks import CHUNK_WRITERS, chunks_of
from analysis.whitened.fit import LayerRequest
from analysis.whitening import load_whitening
from core.base.canonical_json import canonical_json
from core.base.errors import UsageError
from core.object_store import Created, open_store
from core.object_store.single_file import read_file
from core.reading import Activations, open_activations

METADATA = "metadata.json"
CHUNK_SAMPLES = 1000
CHUNK_DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class ApplyRequest:
    """Attributes:
    layer: what is whitened; its `stats` is not used.
    whitening: the file. output: a folder, local or a URL.
    writer: a name in `CHUNK_WRITERS`. chunk_samples: samples of a chunk. dtype: one of `CHUNK_DTYPES`.
    """

    layer: LayerRequest
    whitening: str
    output: str
    writer: str = "npz"
    chunk_samples: int = CHUNK_SAMPLES
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.writer not in CHUNK_WRITERS:
            raise UsageError(f"--to {self.writer}: expected one of {', '.join(CHUNK_WRITERS)}")
        if self.dtype not in CHUNK_DTYPES:
            raise UsageError(f"--dtype {self.dtype}: expected one of {', '.join(CHUNK_DTYPES)}")
        if self.chunk_samples < 1:
            raise UsageError(f"--chunk_samples {self.chunk_samples}: expected at least 1")


@dataclass(frozen=True)
class ApplyReport:
    """What was written."""

    output: str
    chunks: int
    samples: int
    tokens: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.output}: {self.chunks} chunks, {self.samples} samples, {self.tokens} tokens, {self.bytes} bytes"
        ]


def whiten_apply(request: ApplyRequest, options: PassOptions) -> ApplyReport:
    """Writes the chunks and, last, metadata.json. An interrupted call goes on where it was, with the same bytes.

    Raises UsageError for what is not stored or does not fit, RunError naming a damaged file.
    """
    acts = open_activations(request.layer.url)
    a_pass = _pass_of(acts, request)
    places = list(chunks_of(acts.parts, request.chunk_samples))
    store = _partials(request.output, options)
    entries = run_pass(a_pass, places, runner=options.choice(), partials=store)
    metadata = canonical_json(_metadata(acts, request, a_pass, entries))
    if open_store(request.output).create_bytes(METADATA, metadata) is Created.ALREADY_DIFFERENT:
        raise UsageError(f"{request.output}/{METADATA} is of other chunks: choose another --output")
    if store is not None and not options.keep_partials:
        store.remove(a_pass)
    counts = [sum(entry[name] for entry in entries) for name in ("n_samples", "n_tokens", "bytes")]
    return ApplyReport(request.output, len(entries), *counts)


def _pass_of(acts: Activations, request: ApplyRequest) -> ApplyPass:
    site, layer = request.layer.of(acts)
    if acts.parts[0].pools:
        raise UsageError(f"{acts.url}: its rows are pools ({', '.join(acts.parts[0].pools)}), which have no positions")
    whitening, digest = load_whitening(request.whitening), hashlib.sha256(read_file(request.whitening)).hexdigest()
    if whitening.width != acts.width(site):
        raise UsageError(
            f"{request.whitening} whitens rows of {whitening.width} values: those of {site} have {acts.width(site)}"
        )
    return ApplyPass(site, layer, request.layer.drop, digest, whitening, request.output, request.writer, request.dtype)


def _partials(output: str, options: PassOptions) -> PartialStore | None:
    """Beside the chunks, which may lie where the shards' folder cannot be written."""
    return None if options.partials == "none" else PartialStore(options.partials or f"{output}/analysis")


def _metadata(
    acts: Activations, request: ApplyRequest, a_pass: ApplyPass, entries: Iterable[dict[str, Any]]
) -> dict[str, Any]:
    own = {name: getattr(a_pass, name) for name in ("site", "layer", "dtype", "writer")}
    whitening = a_pass.whitening
    fitted = asdict(whitening.settings) | {"width": whitening.width, "kept": whitening.kept, "rank": whitening.rank}
    source = about_of(acts, request.layer.stats_request(acts))
    described = {"sha256": a_pass.whitening_digest, "n_tokens": whitening.n_samples} | fitted
    return own | {"source": source, "whitening": described, "chunks": list(entries)}
