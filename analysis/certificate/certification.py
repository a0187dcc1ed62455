"""Compares activations with transformers in float32, eager attention, each sample alone: the fidelity certificate.

Axis letters: L layers stored for a site, T tokens of a sample, K compared tokens, D width of the site.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Shaped

from analysis.certificate.fidelity import CertifiedSample, Comparison, FidelityReport, NextTokens, agreement, verdicts
from core.base.dtypes import DTYPES
from core.base.errors import ModelError, RunError
from qwen2_jax.taps import Capture

if TYPE_CHECKING:
    from torch_models.loading import ModelSource
    from torch_models.reference import Reference

FIDELITY_FILE = "fidelity.json"
_OTHER_FILES = (
    "{} has other files than the model of the run: another format of it, or another model; only the numbers decide"
)
_FEW_TOKENS = 16
_TOO_FEW = "only {} tokens were compared: a correct run can exceed the limit by chance; compare more samples"
_PACKAGES = ("transformers", "torch", "jax", "numpy")


@dataclass(frozen=True)
class Subject:
    """What is certified.

    Attributes:
      layers: site → the layer numbers of its arrays.
      digest: of the model that computed the activations.
      about: further fields of the report.
      device: of the reference.
    """

    capture: Capture
    layers: Mapping[str, tuple[int, ...]]
    compute_dtype: str
    stored_dtype: str
    digest: str | None
    about: Mapping[str, Any]
    device: str = "cpu"


def require_reference(wanted_by: str) -> None:
    """Raises RunError when torch is not installed."""
    from torch_models import require_torch

    try:
        require_torch(wanted_by)
    except ModelError as error:
        raise RunError(str(error)) from error


def compare_with_transformers(
    samples: Sequence[CertifiedSample], subject: Subject, source: ModelSource
) -> FidelityReport:
    """The report on `samples`. Raises RunError when the reference has other sizes, ModelError if it cannot be loaded.

    Two models are loaded, one after the other: in float32, and in the compute dtype for the yardstick.
    """
    from torch_models.loading import model_digest
    from torch_models.reference import Reference

    reference = Reference.load(source, "float32", subject.device)
    truths = [_activations(reference, sample, subject.capture) for sample in samples]
    _require_alike(samples, truths, source)
    ours, yardstick = Comparison(subject.layers), Comparison(subject.layers)
    for sample, truth in zip(samples, truths, strict=True):
        ours.add(sample.ours, truth)
    missing = reference.missing(subject.capture)
    next_tokens, wanted = _next_tokens(reference, samples)
    if subject.compute_dtype != "float32":
        del reference
        reference = Reference.load(source, subject.compute_dtype, subject.device)
    for sample, truth in zip(samples, truths, strict=True):
        rounded = truth if subject.compute_dtype == "float32" else _activations(reference, sample, subject.capture)
        yardstick.add({site: as_stored(values, subject.stored_dtype) for site, values in rounded.items()}, truth)
    if wanted:
        theirs = [reference.next_tokens(sample.token_ids)[sample.compared] for sample in samples]
        next_tokens = replace(next_tokens, yardstick=agreement(theirs, wanted)[0])
    digest, tokens = model_digest(source), sum(len(sample.compared) for sample in samples)
    notes = [_OTHER_FILES.format(source.path)] if digest != subject.digest else []
    return FidelityReport(
        about=_about(subject, digest),
        samples=tuple(sample.name for sample in samples),
        tokens=tokens,
        layers=verdicts(ours.figures(), yardstick.figures()),
        next_tokens=next_tokens,
        not_compared=missing,
        notes=(*notes, _TOO_FEW.format(tokens)) if tokens < _FEW_TOKENS else tuple(notes),
    )


def _activations(
    reference: Reference, sample: CertifiedSample, capture: Capture
) -> dict[str, Float32[np.ndarray, "L K _"]]:
    values = reference.activations(sample.token_ids, capture)
    return {site: array[:, sample.compared] for site, array in values.items()}


def _require_alike(
    samples: Sequence[CertifiedSample], truths: Sequence[Mapping[str, np.ndarray]], source: ModelSource
) -> None:
    for sample, truth in zip(samples, truths, strict=True):
        for site, array in truth.items():
            if sample.ours[site].shape != array.shape:
                theirs, width = array.shape[-1], sample.ours[site].shape[-1]
                raise RunError(
                    f"{source.path}: its {site} has width {theirs}, that of the run {width}: "
                    "pass the model that the run was made with"
                )


def as_stored(values: Float32[np.ndarray, " *shape"], dtype: str) -> Shaped[np.ndarray, " *shape"]:
    """Rounded to the stored dtype; values beyond its range become its largest."""
    stored = DTYPES[dtype]
    largest = float(ml_dtypes.finfo(stored).max)
    return np.clip(values, -largest, largest).astype(stored)


def _next_tokens(reference: Reference, samples: Sequence[CertifiedSample]) -> tuple[NextTokens, list[np.ndarray]]:
    """How often we predict the reference's next token, and the reference's tokens.

    The prediction is by our own logits or, for samples that have only final values, by the reference's head from them.
    """
    if not reference.loaded.has_head:
        return NextTokens("the reference has no output head"), []
    found = [sample.next_tokens for sample in samples if sample.next_tokens is not None]
    by = "our logits"
    if not found:
        finals = [sample.final for sample in samples if sample.final is not None]
        found = [reference.next_tokens_of(final.values, normed=final.normed) for final in finals]
        by = f"our {'final norm' if finals and finals[0].normed else 'last residual'} through the reference's head"
    if len(found) < len(samples):
        return NextTokens("neither our logits nor the residual of the last layer nor final_norm are known"), []
    wanted = [reference.next_tokens(sample.token_ids)[sample.compared] for sample in samples]
    share, positions = agreement(found, wanted)
    return NextTokens(by, share, positions=positions), wanted


def _about(subject: Subject, reference_digest: str) -> dict[str, Any]:
    versions = {package: metadata.version(package) for package in _PACKAGES} | {"python": platform.python_version()}
    return {
        "reference": f"transformers {versions['transformers']} in float32, eager attention, one sample at a time",
        "reference_digest": reference_digest,
        "compute_dtype": subject.compute_dtype,
        "stored_dtype": subject.stored_dtype,
        "versions": versions,
        **subject.about,
    }
