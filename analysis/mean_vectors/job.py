"""What is decided and refused before the first vector is computed."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from analysis.mean_vectors.extraction import VectorExtractor, load_extractor
from analysis.mean_vectors.modes import POOLS, layers_of, modes_of
from analysis.mean_vectors.options import DEFAULT_LENGTH, MeanOptions
from analysis.mean_vectors.stored.metadata import MeanMetadata, check_same, declare, read_metadata
from analysis.mean_vectors.stored.names import METADATA, is_ours
from core.backends import choose_backend
from core.base.errors import UsageError
from core.base.redaction import redact
from core.object_store import LocalStore, ObjectStore, open_store
from core.step.backend import Backend
from core.step.model_shape import ModelShape, check_sample_length
from qwen2_jax import tokenizer_digest

_VERSION = 1
"""Of the identity: raised when the code would write other vectors."""


@dataclass(frozen=True)
class MeanJob:
    """A run whose options were checked, and its output folder."""

    options: MeanOptions
    store: ObjectStore
    identity: dict[str, Any]

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes whose vectors are stored."""
        return modes_of(self.options.mode)

    @cached_property
    def extractor(self) -> VectorExtractor:
        """The model, loaded at first use: where every batch is stored it is not needed."""
        options, identity = self.options, self.identity
        return load_extractor(
            options.model_path,
            modes=self.modes,
            layers=identity["layers"],
            max_seq_length=identity["max_seq_length"],
            overlong=options.overlong,
            revision=options.revision,
            backend=options.backend,
            compute_dtype=options.compute_dtype,
            trust_remote_code=options.trust_remote_code,
            rows_per_step=options.rows_per_step,
        )

    def metadata(self) -> MeanMetadata:
        """The content of `metadata.json` before there are results."""
        return MeanMetadata(self.identity, redact(self.options.model_path), self.options.revision)


def prepare(options: MeanOptions) -> MeanJob:
    """The job of some options, its identity written to the output folder.

    Reads the weights once for their digest. Raises UsageError for options that cannot be, and for a folder that holds
    the vectors of another run, naming the fields that differ; ModelError for the model.
    """
    options.validate()
    backend = choose_backend(
        options.backend, options.model_path, options.revision, trust_remote_code=options.trust_remote_code
    )
    shape = backend.model_shape(options.model_path, options.revision)
    job = MeanJob(options, open_store(options.output), _identity(options, backend, shape))
    store = job.store
    if isinstance(store, LocalStore):
        store.remove_stale_temporaries()
    if options.overwrite:
        clear(store)
    stored = read_metadata(store)
    if stored is not None:
        check_same(store, stored, job.identity)
    elif any(map(is_ours, store.list())):
        raise UsageError(f"{store.url}: it holds vectors and no {METADATA}: use another --output, or --overwrite")
    else:
        declare(store, job.metadata())
    return job


def clear(store: ObjectStore) -> None:
    """Deletes the files of `mean` in a folder, and nothing else; the metadata last, which says whose they are."""
    read_metadata(store)
    ours = [name for name in store.list() if is_ours(name)]
    for name in sorted(ours, key=lambda name: name == METADATA):
        store.delete(name)


def _identity(options: MeanOptions, backend: Backend, shape: ModelShape) -> dict[str, Any]:
    length = options.max_seq_length or min(DEFAULT_LENGTH, shape.max_positions)
    check_sample_length(length, shape, options.model_path)
    digest = backend.model_digest(options.model_path, options.revision)
    return {
        "version": _VERSION,
        "site": "residual",
        "layers": list(layers_of(options.layers, shape, options.model_path)),
        "mode": options.mode,
        "pools": {mode: list(POOLS[mode]) for mode in modes_of(options.mode)},
        "model": {"family": shape.family, "digest": digest},
        "tokenizer": tokenizer_digest(options.model_path, options.revision),
        "backend": backend.name,
        "compute_dtype": backend.compute_dtype(options.compute_dtype),
        "max_seq_length": length,
        "overlong": options.overlong,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }
