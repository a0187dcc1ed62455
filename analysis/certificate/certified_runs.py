"""The certificate of a run that is about to start: `extract_activations.py --certify N`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from jaxtyping import Float32, Int, Shaped

from analysis.certificate.certification import (
    FIDELITY_FILE,
    Subject,
    compare_with_transformers,
    require_reference,
)
from analysis.certificate.fidelity import CertifiedSample
from core.base.canonical_json import canonical_json, content_hash
from core.base.errors import ModelError, RunError
from core.run.job import Job
from core.run.stores import Stores
from core.samples.windows import TokenizedSample, Window
from core.step.backend import Step
from core.step.host_copies import begin_copies, on_host
from core.step.layout import lay_out_steps, sample_spans, step_arrays

if TYPE_CHECKING:
    from torch_models.loading import ModelSource


@dataclass(frozen=True)
class _Computed:
    """The output of a step for one sample: values by site in the step's dtype, norms of P pairs of site and layer."""

    values: dict[str, Shaped[np.ndarray, "L T _"]]
    norms: Float32[np.ndarray, "P T"]


def certify_run(job: Job, stores: Stores) -> None:
    """Certifies the first `config.certify` samples that store a token, and writes fidelity.json into the job's folder.

    The run's own step computes them, packed as the run packs them, and is freed before the reference is loaded.
    Raises RunError, with nothing written, when they are not faithful and --allow_unfaithful is not given.
    """
    config = job.config
    require_reference("--certify: the reference")
    windows = _first_windows(job, config.certify)
    if not windows:
        logging.warning("--certify: no certificate, because no sample of %s stores a token", job.stream_path)
        return
    logging.info("certifying the first %d samples against transformers in float32", config.certify)
    report = compare_with_transformers(_samples(job, windows), _subject(job), _source(job))
    for line in report.lines():
        logging.info("%s", line)
    if not report.ok and not config.allow_unfaithful:
        raise RunError(
            f"--certify: not faithful: {report.failure()}; nothing was written (--allow_unfaithful extracts anyway)"
        )
    # All hosts of a slice reach the same verdict; host 0 writes it.
    for store in stores.all() if job.hosts.is_first else ():
        store.replace_bytes(f"{job.folder}/{FIDELITY_FILE}", canonical_json(report.to_json()))


def _source(job: Job) -> ModelSource:
    from torch_models.loading import ModelSource

    config = job.config
    if config.certify_against is not None:
        return ModelSource(config.certify_against, None, config.trust_remote_code)
    return ModelSource(config.model_path, config.revision, config.trust_remote_code)


def _subject(job: Job) -> Subject:
    from torch_models.loading import best_device

    return Subject(
        capture=job.capture,
        layers=job.layers,
        compute_dtype=job.compute_dtype,
        stored_dtype=job.step_request.stored_dtype,
        digest=job.identity.model["digest"],
        about={
            "computed_by": f"the step of the run, {'packed' if job.batch_shape.pack else 'one sample a row'}",
            "backend": job.backend.name,
            "model": job.identity.model,
            "plan_hash": content_hash(job.identity.to_json()),
        },
        # JAX has reserved the memory of its devices, so the reference runs on the CPU.
        device=best_device() if job.backend.name == "torch" else "cpu",
    )


def _samples(job: Job, windows: Sequence[tuple[Window, list[int]]]) -> list[CertifiedSample]:
    """The chosen samples of each window, computed by the run's step; only their tokens that the run stores.

    The next tokens are those of the whole model with its head, which is loaded after the step is freed.
    """
    step = job.backend.load(job.config.model_path, job.config.revision, job.step_request)
    computed = [found for window, chosen in windows for found in _window_values(job, step, window, chosen)]
    del step
    samples = [window.samples[index] for window, chosen in windows for index in chosen]
    texts = [sample.token_ids for sample in samples]
    tokens: Sequence[np.ndarray | None]
    try:
        tokens = job.backend.next_tokens(job.config.model_path, job.config.revision, job.compute_dtype, texts)
    except ModelError as error:
        logging.warning("--certify: next tokens are not compared: %s", error)
        tokens = [None] * len(samples)
    return [_certified(job, *of_sample) for of_sample in zip(samples, computed, tokens, strict=True)]


def _certified(
    job: Job, sample: TokenizedSample, found: _Computed, next_tokens: Int[np.ndarray, " T"] | None
) -> CertifiedSample:
    compared = _stored_places(job, sample, found)
    ours = {site: values[:, compared] for site, values in found.values.items()}
    for site, values in ours.items():
        if not np.isfinite(values.astype(np.float32)).all():
            raise RunError(
                f"{job.stream_path}, sample_idx {sample.sample_idx}, {site}: a value is NaN or out of range for "
                f"{job.config.dtype}: store with --dtype bfloat16 or --dtype float32, compute with "
                "--compute_dtype float32"
            )
    return CertifiedSample(
        name=str(sample.sample_idx),
        token_ids=sample.token_ids,
        compared=compared,
        ours=ours,
        next_tokens=None if next_tokens is None else next_tokens[compared],
    )


def _stored_places(job: Job, sample: TokenizedSample, found: _Computed) -> np.ndarray:
    """The positions of the tokens that the run stores."""
    reasons = sample.reasons
    if reasons is None:
        return np.arange(len(sample.token_ids))
    if job.selection is not None and job.selection.needs_norms:
        reasons = job.selection.after(reasons, found.norms, sample.sample_idx)
    return np.flatnonzero(reasons == 0)


def _first_windows(job: Job, n_samples: int) -> list[tuple[Window, list[int]]]:
    """The windows of the first `n_samples` samples that store a token, each with the indices of these samples."""
    chosen: list[tuple[Window, list[int]]] = []
    left = n_samples
    for window in job.windows():
        storing = [index for index, sample in enumerate(window.samples) if sample.n_stored][:left]
        if storing:
            chosen.append((window, storing))
        left -= len(storing)
        if not left:
            break
    return chosen


def _window_values(job: Job, step: Step, window: Window, chosen: Sequence[int]) -> list[_Computed]:
    """The step's output for each chosen sample of a window. Only steps with a chosen sample run."""
    found: dict[int, _Computed] = {}
    token_ids = [sample.token_ids for sample in window.samples]
    for layout in lay_out_steps(window.lengths, job.batch_shape):
        spans = [span for span in sample_spans(layout, window.lengths) if span[1] in chosen]
        if not spans:
            continue
        output = on_host(begin_copies(step(step_arrays(layout, token_ids))))
        stacked = np.concatenate([*output.norms.values(), np.zeros((0, layout.n_rows, layout.length), np.float32)])
        for row, sample, start, stop in spans:
            of_sample = {site: array[:, row, start:stop].copy() for site, array in output.arrays.items()}
            found[sample] = _Computed(of_sample, stacked[:, row, start:stop])
    return [found[sample] for sample in chosen]
