"""From flags to a job: everything that can be known, checked and refused before weights are loaded."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core.activation_storage import ActivationStorage
from core.batching import BatchShape, default_row_lengths
from core.dataset_utils import (
    BadRecord,
    format_bad,
    read_stream,
    resolve_stream_path,
    stream_identity,
)
from core.errors import RunError, UsageError
from core.formats import DTYPES
from core.object_store import LocalStore, ObjectStore, open_store
from core.plan import RunPlan, StreamPlan
from core.prompts import PromptOptions, Tokenizer
from core.run_config import RunConfig
from core.windows import StreamPlace, TokenizedSample, Window, cut_windows
from qwen2_jax import Capture, DecoderConfig, load_config, load_tokenizer, model_identity, tokenizer_digest


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can start.

    Attributes:
      stream_path: the stream, in the spelling that exists.
      compute_dtype: resolved for this machine.
      bytes_per_token: stored by the largest file of a window.
    """

    config: RunConfig
    stream_path: str
    model: DecoderConfig
    capture: Capture
    compute_dtype: str
    plan: RunPlan
    stream: StreamPlan
    tokenizer: Tokenizer

    @property
    def bytes_per_token(self) -> int:
        """Stored bytes of one token in one site's file: every layer, before compression."""
        return len(self.capture.layers) * self.model.d_model * DTYPES[self.config.dtype].itemsize

    def batch_shape(self, n_devices: int) -> BatchShape:
        """How samples are laid into steps on `n_devices` data-parallel devices."""
        row_lengths = default_row_lengths(self.config.max_seq_length)
        return BatchShape(self.config.batch_size * n_devices, n_devices, row_lengths, self.config.pack)

    def items(self, start: StreamPlace | None = None) -> Iterator[TokenizedSample | BadRecord]:
        """The samples and bad records of the stream from `start` on."""
        records = read_stream(
            self.stream_path,
            machine_id=self.config.machine_id,
            total_machines=self.config.total_machines,
            max_tasks=self.config.max_tasks,
            start_position=start.position if start else 0,
        )
        return self.tokenizer.samples(records, start.sample_idx if start else 0)

    def windows(
        self, *, start: StreamPlace | None = None, first_index: int = 1, bad_before: int = 0
    ) -> Iterator[Window]:
        """The windows of the stream from `start` on; raises RunError at one bad record too many."""
        return cut_windows(
            self._admit(self.items(start), bad_before),
            bytes_per_token=self.bytes_per_token,
            shard_bytes=self.config.shard_bytes,
            first_index=first_index,
        )

    def _admit(self, items: Iterator[TokenizedSample | BadRecord], n_bad: int) -> Iterator[TokenizedSample | BadRecord]:
        n_samples = 0
        for item in items:
            if isinstance(item, BadRecord):
                n_bad += 1
                if n_bad > self.config.max_bad_records:
                    raise RunError(
                        f"{format_bad(self.stream_path, item)} "
                        f"(mend the line, or set bad ones aside with --max_bad_records)"
                    )
            else:
                n_samples += 1
            yield item
        if not n_samples:
            config = self.config
            share = f" for machine {config.machine_id} of {config.total_machines}" if config.total_machines > 1 else ""
            raise RunError(f"{self.stream_path}: no usable sample{share} ({n_bad} bad records)")


def prepare_job(config: RunConfig, compute_dtype: str) -> Job:
    """Checks model, layers, prompts and stream; raises UsageError, ModelError or RunError saying what is wrong."""
    options = PromptOptions(
        grid_encoder=config.grid_encoder,
        prompt_version=config.prompt_version,
        predictions=config.predictions_per_task,
        seed=config.random_seed,
        max_seq_length=config.max_seq_length,
        overlong=config.overlong,
    )
    options.validate()
    assert config.dataset_path is not None
    stream_path = resolve_stream_path(config.dataset_path)
    model = load_config(config.model_path, config.revision)
    capture = _capture(config, model)
    _check_length(config, model)
    tokenizer_path = config.tokenizer_path or config.model_path
    revision = None if config.tokenizer_path else config.revision
    return Job(
        config=config,
        stream_path=stream_path,
        model=model,
        capture=capture,
        compute_dtype=compute_dtype,
        plan=_run_plan(config, capture, options, compute_dtype, tokenizer_digest(tokenizer_path, revision)),
        stream=StreamPlan(stream_identity(stream_path), config.machine_id, config.total_machines, config.max_tasks),
        tokenizer=Tokenizer(options, partial(load_tokenizer, tokenizer_path, revision), model.vocab_size),
    )


def _capture(config: RunConfig, model: DecoderConfig) -> Capture:
    layers = range(model.n_layers) if config.layers_to_extract is None else sorted(set(config.layers_to_extract))
    missing = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if missing:
        raise UsageError(f"--layers_to_extract {missing[0]}: {config.model_path} has layers 0 to {model.n_layers - 1}")
    return Capture(layers=tuple(layers), sites=config.activation_type)


def _check_length(config: RunConfig, model: DecoderConfig) -> None:
    if config.max_seq_length > model.max_positions:
        raise UsageError(
            f"--max_seq_length {config.max_seq_length}: {config.model_path} knows {model.max_positions} positions"
        )


def _run_plan(
    config: RunConfig, capture: Capture, options: PromptOptions, compute_dtype: str, tokenizer: str | None
) -> RunPlan:
    return RunPlan(
        model=model_identity(config.model_path, config.revision),
        tokenizer=tokenizer,
        prompts={
            "grid_encoder": options.grid_encoder,
            "prompt_version": options.prompt_version,
            "predictions_per_task": options.predictions,
            "random_seed": options.seed,
        },
        sites=capture.sites,
        layers=capture.layers,
        dtype=config.dtype,
        compute_dtype=compute_dtype,
        format=config.format,
        compress=config.compress_shards,
        shard_bytes=config.shard_bytes,
        max_seq_length=config.max_seq_length,
        overlong=config.overlong,
    )


def open_storage(job: Job) -> ActivationStorage:
    """The worker's folder where the flags say it is; nothing is written yet.

    Local output: written in place. Remote output: files are finished in a folder below TMPDIR, then uploaded. Local
    output with upload: the bucket is where a commit counts, the local folder is a copy unless it is to be deleted.
    """
    config = job.config
    spool = LocalStore(_scratch_folder() if config.output_is_remote else config.local_output)
    primary: ObjectStore = spool
    if config.output_is_remote:
        primary = open_store(config.output_dir)
    elif config.upload_to_gcs:
        primary = open_store(config.gcs_url)
    return ActivationStorage(
        job.plan,
        job.stream,
        config.folder,
        primary=primary,
        spool=spool,
        mirror=spool if config.upload_to_gcs and not config.delete_local_after_upload else None,
        index_extra={
            "shard_size_gb": config.shard_size_gb,
            "gcs_bucket": config.gcs_bucket if config.upload_to_gcs else None,
            "gcs_prefix": config.gcs_prefix if config.upload_to_gcs else None,
        },
    )


def _scratch_folder() -> Path:
    """One for all runs of a user: what a killed run leaves there, the next one finds and removes."""
    return Path(tempfile.gettempdir()) / f"extract_activations_{os.getuid()}"
