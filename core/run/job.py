"""From flags to a job: everything that can be known, checked and refused before weights are loaded."""

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from absl import logging

from core.activation_storage import ActivationStorage
from core.base.dtypes import DTYPES
from core.base.errors import ModelError, RunError, UsageError
from core.commit.identity import RunPlan, StreamPlan
from core.commit.output_identity import RUN_FILE
from core.dataset_utils import (
    BadRecord,
    format_bad,
    read_stream,
    resolve_stream_path,
    stream_identity,
)
from core.hosts.pod_slice import ALONE, Hosts
from core.object_store import LocalStore, ObjectStore, disk_errors, open_store
from core.reduce.projection import read_projection
from core.reduce.reductions import QUANTIZATIONS, VALUES, Pool, Reduction, StoredArray, parse_pool
from core.run.config import RunConfig
from core.samples.prompts import PromptOptions, Tokenizer
from core.samples.selection import NORM_SITES, Selection, TokenFacts
from core.samples.window_parts import PartOfWindow, parts_of_window
from core.samples.windows import StreamPlace, TokenizedSample, Window, cut_windows
from core.step.backend import Backend, StepRequest
from core.step.backends import choose_backend
from core.step.capture import resolve_capture, site_bytes
from core.step.layout import BatchShape, default_row_lengths, packed_row_lengths
from core.step.model_shape import ModelShape, check_sample_length
from core.streams.sharded_dataset import ShardEntry, find_shard, read_dataset
from qwen2_jax import Capture, load_tokenizer, tokenizer_digest


@dataclass(frozen=True)
class Job:
    """A run that has been checked and can start.

    Attributes:
      stream_path: the stream, in the spelling that exists, or the folder of a dataset shard.
      folder: where its activations go in the output: the worker's folder, or that of the dataset shard.
      compute_dtype: resolved for this machine.
      facts: what the tokenizer says of token ids, where the selection asks for it.
      reduction: what is done to the selected tokens; None: they are stored as they are.
      hosts: those that share the windows.
    """

    config: RunConfig
    stream_path: str
    folder: str
    backend: Backend
    model: ModelShape
    capture: Capture
    compute_dtype: str
    plan: RunPlan
    stream: StreamPlan
    tokenizer: Tokenizer
    selection: Selection | None = None
    facts: TokenFacts | None = None
    reduction: Reduction | None = None
    hosts: Hosts = ALONE

    @property
    def layers(self) -> dict[str, tuple[int, ...]]:
        """By site, the layer numbers under which it is stored."""
        return {site: self.capture.layers_of(site, self.model.n_layers) for site in self.capture.sites}

    @property
    def stored(self) -> dict[str, dict[str, StoredArray]]:
        """By site and name, the arrays that are stored."""
        reduction, dtype = self.reduction or Reduction(), DTYPES[self.config.dtype]
        return {site: reduction.arrays(self.model.site_widths[site], dtype) for site in self.capture.sites}

    @property
    def stored_dtype(self) -> str:
        """Of what is stored as activations: values, or codes."""
        return next(iter(self.stored.values()))[VALUES].dtype.name

    @property
    def pools(self) -> tuple[Pool, ...]:
        """The vectors that are stored of a sample; empty: one a token."""
        return () if self.reduction is None else self.reduction.pools

    @property
    def bytes_per_token(self) -> dict[str, int]:
        """By site, the bytes of one token in the stored dtype before it is reduced: every layer, uncompressed."""
        return site_bytes(self.capture, self.model, self.config.dtype)

    @property
    def keeps_local_copy(self) -> bool:
        """Whether everything that is stored also stays on this machine's disk."""
        return self.config.local_copy_stays and (self.plan.parts == 1 or not self.config.uploads)

    @property
    def bytes_per_row(self) -> dict[str, int]:
        """By site, the stored bytes of one token, or of one pool of a sample: every layer, before compression."""
        return {
            site: len(self.layers[site]) * sum(array.row_bytes for array in arrays.values())
            for site, arrays in self.stored.items()
        }

    @property
    def step_request(self) -> StepRequest:
        """What the backend has to compute."""
        return step_request(self.config, self.capture, self.compute_dtype, self.selection, self.reduction)

    @property
    def batch_shape(self) -> BatchShape:
        """How each host lays samples into steps."""
        row_multiple = self.backend.row_multiple(self.model, self.step_request)
        pack, longest = self.config.pack and self.backend.can_pack, self.config.max_seq_length
        row_lengths = (
            packed_row_lengths(longest, long_rows=self.backend.has_long_rows) if pack else default_row_lengths(longest)
        )
        return BatchShape(self.config.batch_size * row_multiple, row_multiple, row_lengths, pack)

    def items(self, start: StreamPlace | None = None) -> Iterator[TokenizedSample | BadRecord]:
        """The samples and bad records of the stream from `start` on, with the reasons that are known beforehand."""
        records = read_stream(
            self.stream_path,
            machine_id=self.config.machine_id,
            total_machines=self.config.total_machines,
            max_tasks=self.stream.max_tasks,
            start_position=start.position if start else 0,
        )
        items = self.tokenizer.samples(records, start.sample_idx if start else 0)
        return items if self.selection is None and not self.pools else map(self.select, items)

    def select(self, item: TokenizedSample | BadRecord) -> TokenizedSample | BadRecord:
        """A sample with what is known before the forward pass of what will be stored of it; a bad record as it is."""
        if isinstance(item, BadRecord):
            return item
        item = replace(item, n_pools=len(self.pools))
        if self.selection is None:
            return item
        reasons = self.selection.before(item.token_ids, item.sample_idx, self.facts)
        most_kept = self.selection.most_kept(reasons) if self.selection.needs_norms else None
        return replace(item, reasons=reasons, most_kept=most_kept)

    def windows(
        self, *, start: StreamPlace | None = None, first_index: int = 1, bad_before: int = 0
    ) -> Iterator[Window]:
        """The windows of the stream from `start` on; raises RunError at one bad record too many."""
        return cut_windows(
            self._admit(self.items(start), bad_before),
            bytes_per_row=max(self.bytes_per_row.values()),
            # Every part has files of its own, which are to reach the size that was asked for.
            shard_bytes=self.config.shard_bytes * self.plan.parts,
            first_index=first_index,
        )

    def parts_of(self, window: Window) -> Iterator[PartOfWindow]:
        """What this host computes of a window, turn by turn."""
        return parts_of_window(
            window, self.batch_shape, n_parts=self.plan.parts, host=self.hosts.number, n_hosts=self.hosts.count
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
        config = self.config
        is_share = config.total_machines > 1
        # A stream may have fewer lines than machines: there is nothing to do then, and nothing wrong.
        if not n_samples and (n_bad or not is_share):
            share = f" for machine {config.machine_id} of {config.total_machines}" if is_share else ""
            raise RunError(f"{self.stream_path}: no usable sample{share} ({n_bad} bad records)")


def step_request(
    config: RunConfig,
    capture: Capture,
    compute_dtype: str,
    selection: Selection | None = None,
    reduction: Reduction | None = None,
) -> StepRequest:
    """What the backend of a run with these flags has to compute."""
    norm_sites = NORM_SITES if selection is not None and selection.needs_norms else ()
    return StepRequest(
        capture,
        # What is reduced is not rounded before.
        config.dtype if reduction is None else compute_dtype,
        compute_dtype,
        tuple(site for site in capture.sites if site in norm_sites),
    )


def backend_of(config: RunConfig) -> Backend:
    """What computes the activations. Raises as `choose_backend` does."""
    return choose_backend(
        config.backend,
        config.model_path,
        config.revision,
        mesh=config.mesh,
        weights_cache_dir=config.weights_cache_dir,
        trust_remote_code=config.trust_remote_code,
    )


def prepare_job(config: RunConfig, compute_dtype: str, hosts: Hosts = ALONE) -> Job:
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
    return _prepare(config, compute_dtype, hosts, path, config.folder, stream)


def prepare_shard_jobs(config: RunConfig, compute_dtype: str, hosts: Hosts = ALONE) -> list[Job]:
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
    first = _prepare(config, compute_dtype, hosts, f"{url}/{taken[0].name}", taken[0].name, streams[0])
    return [
        replace(first, stream_path=f"{url}/{shard.name}", folder=shard.name, stream=stream)
        for shard, stream in zip(taken, streams, strict=True)
    ]


def _shard_stream(shard: ShardEntry, limit: int) -> StreamPlan:
    max_tasks = limit - shard.first_task
    return StreamPlan(shard.identity, 0, 1, max_tasks if max_tasks < shard.num_tasks else None, shard.first_task)


def _prepare(
    config: RunConfig, compute_dtype: str, hosts: Hosts, stream_path: str, folder: str, stream: StreamPlan
) -> Job:
    options = PromptOptions(
        grid_encoder=config.grid_encoder,
        prompt_version=config.prompt_version,
        predictions=config.predictions_per_task,
        seed=config.random_seed,
        max_seq_length=config.max_seq_length,
        overlong=config.overlong,
    )
    options.validate()
    backend = backend_of(config)
    model = backend.model_shape(config.model_path, config.revision)
    capture = resolve_capture(config.activation_type, config.layers_to_extract, model, config.model_path)
    check_sample_length(config.max_seq_length, model, config.model_path)
    selection = checked_selection(config, capture)
    reduction = checked_reduction(config, capture, model)
    tokenizer_path = config.tokenizer_path or config.model_path
    revision = None if config.tokenizer_path else config.revision
    tokenizer = Tokenizer(options, partial(load_tokenizer, tokenizer_path, revision), model.vocab_size)
    facts = _token_facts(config, tokenizer)
    digest = tokenizer_digest(tokenizer_path, revision)
    return Job(
        config=config,
        stream_path=stream_path,
        folder=folder,
        backend=backend,
        model=model,
        capture=capture,
        compute_dtype=compute_dtype,
        plan=_run_plan(config, backend, model, capture, compute_dtype, digest, reduction, _parts(hosts, config)),
        stream=stream,
        tokenizer=tokenizer,
        selection=selection,
        facts=facts,
        reduction=reduction,
        hosts=hosts,
    )


def checked_selection(config: RunConfig, capture: Capture) -> Selection | None:
    """The selection of a run. Raises UsageError where it needs what is not captured."""
    selection = config.selection
    if selection is not None and selection.needs_norms and not set(NORM_SITES) & set(capture.sites):
        raise UsageError(
            "--exclude_norm_outliers: the norms are those of the residual stream: capture one of "
            f"{', '.join(NORM_SITES)} too"
        )
    return selection


def checked_reduction(config: RunConfig, capture: Capture, model: ModelShape) -> Reduction | None:
    """The reduction of a run, its matrix read. Raises UsageError where it does not fit what is captured."""
    reduction = Reduction(
        projection=None if config.project is None else read_projection(config.project),
        pools=tuple(parse_pool(text) for text in config.pool),
        topk=config.topk,
        quantization=config.quantization,
    )
    if reduction == Reduction():
        return None
    layers = {site: len(capture.layers_of(site, model.n_layers)) for site in capture.sites}
    widths = {site: model.site_widths[site] for site in capture.sites}
    reduction.check(widths, layers)
    widest = max(reduction.arrays(width, DTYPES[config.dtype])[VALUES].width for width in widths.values())
    # It would be one scale a row under another plan. The default block is for rows of any width.
    if (config.quantize_block or 0) > widest:
        raise UsageError(
            f"--quantize_block {config.quantize_block}: no row has more than {widest} values: 0 is one scale a row"
        )
    return reduction


def _token_facts(config: RunConfig, tokenizer: Tokenizer) -> TokenFacts | None:
    """Loads the tokenizer where a kind of token is left out, even if the stream holds token ids."""
    if not config.exclude_tokens:
        return None
    try:
        facts = tokenizer.facts()
    except ModelError as error:
        raise UsageError(
            f"--exclude_tokens {config.exclude_tokens[0]}: only a tokenizer says which tokens these are: {error}"
        ) from error
    for kind in config.exclude_tokens:
        if kind in facts.ids and not facts.ids[kind]:
            logging.warning("--exclude_tokens %s: the tokenizer has no such token, so none is left out", kind)
    return facts


def _run_plan(
    config: RunConfig,
    backend: Backend,
    model: ModelShape,
    capture: Capture,
    compute_dtype: str,
    tokenizer: str | None,
    reduction: Reduction | None,
    parts: int,
) -> RunPlan:
    return RunPlan(
        # The digest says which weights these are; the revision only says where they were found.
        model={"family": model.family, "digest": backend.model_digest(config.model_path, config.revision)},
        tokenizer=tokenizer,
        prompts={
            "grid_encoder": config.grid_encoder,
            "prompt_version": config.prompt_version,
            "predictions_per_task": config.predictions_per_task,
            "random_seed": config.random_seed,
        },
        sites=capture.sites,
        layers=capture.layers,
        dtype=config.dtype if config.quantize is None else QUANTIZATIONS[config.quantize].name,
        compute_dtype=compute_dtype,
        format=config.format,
        compress=config.compress_shards,
        shard_bytes=config.shard_bytes,
        max_seq_length=config.max_seq_length,
        overlong=config.overlong,
        selection=None if config.selection is None else config.selection.to_json(),
        backend=backend.name,
        reduction=None if reduction is None else reduction.to_json(),
        parts=parts,
    )


# A file says so that somebody else may have written.
_MOST_PARTS = 1 << 16


def _parts(hosts: Hosts, config: RunConfig) -> int:
    """Into how many parts windows are cut: as the output has it already, else one for each host.

    A slice of another size, or a single machine, can so go on where a slice was lost.
    """

    def found() -> int:
        try:
            parts = json.loads(open_stores(config).primary.read_bytes(RUN_FILE)).get("parts", 1)
        except FileNotFoundError:
            return hosts.count
        except (ValueError, AttributeError):
            return hosts.count  # what is wrong with it is said where the plans are compared
        return parts if type(parts) is int and 1 <= parts <= _MOST_PARTS else hosts.count

    parts = hosts.share("parts", found)
    if parts < hosts.count:
        logging.warning(
            "%s says that a window has %d parts: of %d hosts the rest is idle", RUN_FILE, parts, hosts.count
        )
    elif parts > hosts.count:
        logging.info("parts of each window, as %s says: %d; hosts that share them: %d", RUN_FILE, parts, hosts.count)
    if parts > 1 and config.uploads and config.local_copy_stays:
        logging.info("the hosts of a slice keep no local copy: each would have its own parts alone")
    return parts


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


def open_stores(config: RunConfig, parts: int = 1) -> Stores:
    """The output where the flags say it is; nothing is written yet. parts: of each window, see `RunPlan`.

    Local output: written in place. Remote output: files are finished in a folder below TMPDIR, then uploaded. Local
    output with upload: the bucket is where a commit counts, the local folder is a copy unless it is to be deleted.
    """
    spool = LocalStore(_scratch_folder() if config.output_is_remote else config.local_output)
    primary: ObjectStore = spool
    if config.output_is_remote:
        primary = open_store(config.output_dir)
    elif config.uploads:
        primary = open_store(config.gcs_url)
    # A host that shares windows with others has its own parts alone on its disk, which is no output.
    keeps_copy = config.uploads and not config.delete_local_after_upload and parts == 1
    return Stores(primary, spool, spool if keeps_copy else None)


def require_shared_output(config: RunConfig, hosts: Hosts) -> None:
    """Raises UsageError on a host that does not find in its local output folder what the first host writes there."""
    if hosts.count == 1 or config.output_is_remote or config.uploads:
        return
    store = LocalStore(config.local_output)
    probe: Path | None = None

    def write() -> str:
        nonlocal probe
        probe = store.temporary_path("probe")
        with disk_errors(probe):
            probe.touch()
        return probe.name

    try:
        name = hosts.share("probe", write)
        if not (store.root / name).exists():
            raise UsageError(
                f"--output_dir {config.output_dir}: host {hosts.number} does not see there what host 0 writes: "
                "name a folder on a shared disk, a gs:// URL, or --upload_to_gcs"
            )
        hosts.tell(f"saw_probe/{hosts.number}", True)
        for host in range(1, hosts.count) if hosts.is_first else ():
            hosts.wait_for(f"saw_probe/{host}")
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)


def open_storage(job: Job, stores: Stores | None = None) -> ActivationStorage:
    """The job's folder in the output; nothing is written yet."""
    config = job.config
    stores = stores or open_stores(config, job.plan.parts)
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
