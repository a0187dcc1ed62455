"""The certificate of committed shards: `analyze_activations.py certify DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from analysis.certificate.certification import (
    FIDELITY_FILE,
    Subject,
    compare_with_transformers,
    final_site,
    require_reference,
)
from analysis.certificate.fidelity import CertifiedSample, FidelityReport, FinalValues
from analysis.verification.stored_identity import read_object, read_run
from analysis.verification.verify import listed_root, worker_folders
from analysis.verification.window_checks import CheckedRow, read_table
from core.base.canonical_json import canonical_json
from core.base.errors import RunError, UsageError
from core.base.json_types import Kinds, mistyped
from core.commit.output_identity import RUN_FILE
from core.commit.record import CommitRecord, StoredFile
from core.commit.stored_records import read_records
from core.object_store import ObjectStore
from core.shards.formats import read_shard
from qwen2_jax.taps import SITES, Capture

if TYPE_CHECKING:
    from torch_models.loading import ModelSource

_IDENTITY: Kinds = {"model": (dict,), "dtype": (str,), "compute_dtype": (str,)}


@dataclass(frozen=True)
class _WindowSamples:
    """A committed window, and which of its samples are compared, by their index in it."""

    folder: str
    record: CommitRecord
    samples: tuple[int, ...]


def certify_output(url: str, source: ModelSource, n_samples: int) -> FidelityReport:
    """Compares `n_samples` committed samples, evenly chosen, with transformers, and writes fidelity.json at `url`.

    url: the output folder, or one worker's folder in it: then only its samples are compared. An earlier certificate is
    replaced. Raises UsageError when there is no run at `url`, RunError when its files cannot be read.
    """
    require_reference("certify: the reference")
    if n_samples < 1:
        raise UsageError(f"--samples {n_samples}: must be at least 1")
    root, names, only = listed_root(url.rstrip("/"))
    folders = [folder for folder in worker_folders(names) if only in (None, folder)]
    if not folders:
        raise UsageError(f"{url}: no run here: pass the folder with {RUN_FILE}")
    identity = _identity(root)
    if identity.get("reduction") is not None:
        raise UsageError(
            f"{url}: its activations are reduced, so they cannot be compared with transformers: extract with "
            "--certify N, which compares them before the reduction"
        )
    places = _choose(root, folders, n_samples)
    stored = places[0].record.sites
    layers = {site: stored[site].layers for site in SITES if site in stored}
    format_name = read_run(root).format
    samples = [sample for place in places for sample in _samples(root, place, format_name, _final(source, layers))]
    subject = Subject(
        capture=_capture(layers),
        layers=layers,
        compute_dtype=identity["compute_dtype"],
        stored_dtype=identity["dtype"],
        digest=identity["model"].get("digest"),
        about={
            "computed_by": "committed shards",
            "backend": identity.get("backend", "jax"),
            "model": identity["model"],
            "plan_hash": places[0].record.plan_hash,
        },
    )
    logging.info("comparing %d committed samples with transformers in float32", len(samples))
    report = compare_with_transformers(samples, subject, source)
    name = FIDELITY_FILE if only is None else f"{only}/{FIDELITY_FILE}"
    root.replace_bytes(name, canonical_json(report.to_json()))
    return report


def _identity(root: ObjectStore) -> dict[str, Any]:
    identity = read_object(root, RUN_FILE)
    wrong = mistyped(identity, _IDENTITY)
    if wrong is not None:
        raise RunError(f"{root.url}/{RUN_FILE}: {wrong!r} is missing or of the wrong type")
    return identity


def _choose(root: ObjectStore, folders: Sequence[str], n_samples: int) -> list[_WindowSamples]:
    """`n_samples` evenly spaced samples of all committed windows that store a token."""
    windows = [(folder, record) for folder in folders for record in read_records(root, folder)]
    if not windows:
        raise RunError(f"{root.url}: nothing is committed yet")
    windows = [(folder, record) for folder, record in windows if record.n_tokens]
    if not windows:
        raise RunError(f"{root.url}: no committed sample stores a token, so there is nothing to compare")
    ends = np.cumsum([record.n_samples for _, record in windows])
    chosen = np.unique(np.linspace(0, ends[-1] - 1, n_samples).round().astype(int))
    places = []
    for (folder, record), end in zip(windows, ends, strict=True):
        within = chosen[(chosen < end) & (chosen >= end - record.n_samples)] - (end - record.n_samples)
        if len(within):
            places.append(_WindowSamples(folder, record, tuple(within.tolist())))
    return places


def _capture(layers: dict[str, tuple[int, ...]]) -> Capture:
    of_blocks = [numbers for site, numbers in layers.items() if SITES[site].per_layer]
    return Capture(of_blocks[0] if of_blocks else (), tuple(site for site in SITES if site in layers))


def _final(source: ModelSource, layers: dict[str, tuple[int, ...]]) -> str | None:
    from torch_models.loading import model_shape

    return final_site(layers, model_shape(source).n_layers)


def _samples(root: ObjectStore, place: _WindowSamples, format_name: str, final: str | None) -> list[CertifiedSample]:
    """The chosen samples of a window, read part by part."""
    samples: list[CertifiedSample] = []
    first = 0
    for counts, files in place.record.files_of_parts():
        chosen = [sample - first for sample in place.samples if first <= sample < first + counts.n_samples]
        first += counts.n_samples
        if chosen and counts.n_tokens:
            samples += _samples_of_part(root, place.folder, files, chosen, format_name, final)
    return samples


def _samples_of_part(
    root: ObjectStore,
    folder: str,
    files: Sequence[StoredFile],
    chosen: Sequence[int],
    format_name: str,
    final: str | None,
) -> list[CertifiedSample]:
    """The chosen samples of a part; one without a stored token is replaced by the next, or last, that has one."""
    values: dict[str, list[np.ndarray]] = {}
    table: list[CheckedRow] = []
    slots: list[int] = []
    for file in files:
        name = f"{folder}/{file.name}"
        try:
            with root.open(name) as stream:
                if file.site is None:
                    table = read_table(stream)
                    slots = _with_tokens(table, chosen)
                else:
                    shard = read_shard(stream, format_name, gzipped=name.endswith(".gz"))
                    values[file.site] = [np.stack([arrays[slot] for arrays in shard.layers.values()]) for slot in slots]
        except (OSError, ValueError, IndexError) as error:
            raise RunError(f"{root.url}/{name}: cannot be read ({error}): verify the folder") from error
    return [
        CertifiedSample(
            name=f"{folder}:{table[slot].sample_idx}",
            token_ids=table[slot].token_ids,
            compared=_stored_places(table[slot]),
            ours={site: arrays[i] for site, arrays in values.items()},
            final=None if final is None else FinalValues(values[final][i][-1], normed=final == "final_norm"),
        )
        for i, slot in enumerate(slots)
    ]


def _stored_places(row: CheckedRow) -> np.ndarray:
    return np.arange(len(row.token_ids)) if row.positions is None else row.positions


def _with_tokens(table: Sequence[CheckedRow], wanted: Sequence[int]) -> list[int]:
    usable = [slot for slot, row in enumerate(table) if len(_stored_places(row))]
    return sorted({min((slot for slot in usable if slot >= first), default=usable[-1]) for first in wanted})
