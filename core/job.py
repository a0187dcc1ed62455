"""From flags to a job: everything that can be known, checked and refused before weights are loaded."""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from core.sharded_dataset import ShardEntry, find_shard, read_dataset
from core.windows import StreamPlace, TokenizedSample, Window, cut_windows
from qwen2_jax import SITES, Capture, DecoderConfig, load_config, load_tokenizer, model_identity, tokenizer_digest


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can start.

    Attributes:
      stream_path: the stream, in the spelling that exists, or the folder of a dataset shard.
      folder: where its activations go in the output: the worker's folder, or that of the dataset shard.
      compute_dtype: resolved for this machine.
      bytes_per_token: stored by the largest file of a window.
    """

    config: RunConfig
    stream_path: str
    folder: str
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
            max_tasks=self.stream.max_tasks,
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
    """The job of --dataset_path.

    Checks model, layers, prompts and stream; raises UsageError, ModelError or RunError saying what is wrong.
    """
    assert config.dataset_path is not None
    path = resolve_stream_path(config.dataset_path)
    shard = find_shard(path)
    first_position = shard.first_task if shard else 0
    stream = StreamPlan(
        stream_identity(path), config.machine_id, config.total_machines, config.max_tasks, first_position
    )
    return _prepare(config, compute_dtype, path, config.folder, stream)


def prepare_shard_jobs(config: RunConfig, compute_dtype: str) -> list[Job]:
    """One job for each shard of --sharded_dataset_dir, all alike but for the shard. Raises as `prepare_job` does.

    `max_tasks` counts from the start of the dataset: shards behind it have no job.
    """
    assert config.sharded_dataset_dir is not None
    url = config.sharded_dataset_dir.rstrip("/")
    dataset = read_dataset(url)
    if config.preferred_shard_id is not None and config.preferred_shard_id >= dataset.num_shards:
        raise UsageError(f"--preferred_shard_id {config.preferred_shard_id}: {url} has {dataset.num_shards} shards")
    limit = dataset.total_tasks if config.max_tasks is None else config.max_tasks
    taken = [shard for shard in dataset.shards if shard.first_task < limit]
    streams = [_shard_stream(shard, limit) for shard in taken]
    first = _prepare(config, compute_dtype, f"{url}/{taken[0].name}", taken[0].name, streams[0])
    return [
        replace(first, stream_path=f"{url}/{shard.name}", folder=shard.name, stream=stream)
        for shard, stream in zip(taken, streams, strict=True)
    ]


def _shard_stream(shard: ShardEntry, limit: int) -> StreamPlan:
    max_tasks = limit - shard.first_task
    return StreamPlan(shard.identity, 0, 1, max_tasks if max_tasks < shard.num_tasks else None, shard.first_task)


def _prepare(config: RunConfig, compute_dtype: str, stream_path: str, folder: str, stream: StreamPlan) -> Job:
    options = PromptOptions(
        grid_encoder=config.grid_encoder,
        prompt_version=config.prompt_version,
        predictions=config.predictions_per_task,
        seed=config.random_seed,
        max_seq_length=config.max_seq_length,
        overlong=config.overlong,
    )
    options.validate()
    model = load_config(config.model_path, config.revision)
    capture = _capture(config, model)
    _check_length(config, model)
    tokenizer_path = config.tokenizer_path or config.model_path
    revision = None if config.tokenizer_path else config.revision
    return Job(
        config=config,
        stream_path=stream_path,
        folder=folder,
        model=model,
        capture=capture,
        compute_dtype=compute_dtype,
        plan=_run_plan(config, capture, options, compute_dtype, tokenizer_digest(tokenizer_path, revision)),
        stream=stream,
        tokenizer=Tokenizer(options, partial(load_tokenizer, tokenizer_path, revision), model.vocab_size),
    )


def _capture(config: RunConfig, model: DecoderConfig) -> Capture:
    layers = range(model.n_layers) if config.layers_to_extract is None else sorted(set(config.layers_to_extract))
    missing = [layer for layer in layers if not 0 <= layer < model.n_layers]
    if missing:
        raise UsageError(f"--layers_to_extract {missing[0]}: {config.model_path} has layers 0 to {model.n_layers - 1}")
    unknown = [site for site in config.activation_type if site not in SITES]
    if unknown:
        raise UsageError(f"--activation_type {unknown[0]}: must be one of {', '.join(SITES)}")
    # In the order of the registry and once each: the same sites are the same run however they are listed.
    return Capture(layers=tuple(layers), sites=tuple(site for site in SITES if site in config.activation_type))


def _check_length(config: RunConfig, model: DecoderConfig) -> None:
    if config.max_seq_length > model.max_positions:
        raise UsageError(
            f"--max_seq_length {config.max_seq_length}: {config.model_path} knows {model.max_positions} positions"
        )


def _run_plan(
    config: RunConfig, capture: Capture, options: PromptOptions, compute_dtype: str, tokenizer: str | None
) -> RunPlan:
    model = model_identity(config.model_path, config.revision)
    return RunPlan(
        # The digest says which weights these are; the revision only says where they were found.
        model={"family": model["family"], "digest": model["digest"]},
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


@dataclass(frozen=True)
class Stores:
    """Where a run writes.

    Attributes:
      primary: where a commit counts.
      spool: where files are written before they are stored.
      mirror: a local copy kept beside a remote primary, or None.
    """

    primary: ObjectStore
    spool: LocalStore
    mirror: ObjectStore | None

    def all(self) -> list[ObjectStore]:
        """The stores that hold the output."""
        return [self.primary, *([self.mirror] if self.mirror is not None else [])]


def open_stores(config: RunConfig) -> Stores:
    """The output where the flags say it is; nothing is written yet.

    Local output: written in place. Remote output: files are finished in a folder below TMPDIR, then uploaded. Local
    output with upload: the bucket is where a commit counts, the local folder is a copy unless it is to be deleted.
    """
    spool = LocalStore(_scratch_folder() if config.output_is_remote else config.local_output)
    primary: ObjectStore = spool
    if config.output_is_remote:
        primary = open_store(config.output_dir)
    elif config.uploads:
        primary = open_store(config.gcs_url)
    return Stores(primary, spool, spool if config.uploads and not config.delete_local_after_upload else None)


def open_storage(job: Job, stores: Stores | None = None) -> ActivationStorage:
    """The job's folder in the output; nothing is written yet."""
    config = job.config
    stores = stores or open_stores(config)
    return ActivationStorage(
        job.plan,
        job.stream,
        job.folder,
        primary=stores.primary,
        spool=stores.spool,
        mirror=stores.mirror,
        index_extra={
            "shard_size_gb": config.shard_size_gb,
            "gcs_bucket": config.gcs_bucket if config.uploads else None,
            "gcs_prefix": config.gcs_prefix if config.uploads else None,
        },
    )


def _scratch_folder() -> Path:
    """One for all runs of a user: what a killed run leaves there, the next one finds and removes."""
    return Path(tempfile.gettempdir()) / f"extract_activations_{os.getuid()}"
