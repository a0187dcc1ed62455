"""From flags to a job: everything that can be checked before weights are loaded."""

import json
from dataclasses import replace
from functools import partial

from absl import logging

from core.backends import choose_backend
from core.base.dtypes import DTYPES
from core.base.errors import ModelError, UsageError
from core.commit.identity import RunIdentity, StreamIdentity
from core.commit.output_identity import RUN_FILE
from core.dataset_utils import (
    resolve_stream_path,
    stream_identity,
)
from core.hosts.pod_slice import SINGLE_HOST, Hosts
from core.reduce.projection import read_projection
from core.reduce.reductions import QUANTIZATIONS, VALUES, Reduction, parse_pool
from core.run.config import RunConfig
from core.run.job import Job
from core.run.stores import open_stores
from core.samples.prompts import PromptOptions, Tokenizer
from core.samples.selection import NORM_SITES, Selection, TokenFacts
from core.step.backend import Backend
from core.step.capture import resolve_capture
from core.step.model_shape import ModelShape, check_sample_length
from core.streams.sharded_dataset import DatasetShard, find_shard, read_dataset
from qwen2_jax import Capture, load_tokenizer, tokenizer_digest


def backend_of(config: RunConfig) -> Backend:
    """The backend that computes the activations. Raises as `choose_backend` does."""
    return choose_backend(
        config.backend,
        config.model_path,
        config.revision,
        mesh=config.mesh,
        weights_cache_dir=config.weights_cache_dir,
        trust_remote_code=config.trust_remote_code,
    )


def prepare_job(config: RunConfig, compute_dtype: str, hosts: Hosts = SINGLE_HOST) -> Job:
    """The job of --dataset_path.

    Checks model, layers, prompts and stream; raises UsageError, ModelError or RunError describing the problem.
    """
    assert config.dataset_path is not None
    path = resolve_stream_path(config.dataset_path)
    shard = find_shard(path)
    first_position = shard.first_task if shard else 0
    stream = StreamIdentity(
        stream_identity(path), config.machine_id, config.total_machines, config.max_tasks, first_position
    )
    return _prepare(config, compute_dtype, hosts, path, config.folder, stream)


def prepare_shard_jobs(config: RunConfig, compute_dtype: str, hosts: Hosts = SINGLE_HOST) -> list[Job]:
    """One job for each shard of --sharded_dataset_dir, otherwise identical. Raises as `prepare_job` does.

    `max_tasks` counts from the start of the dataset: shards after it have no job.
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


def _shard_stream(shard: DatasetShard, limit: int) -> StreamIdentity:
    max_tasks = limit - shard.first_task
    return StreamIdentity(shard.identity, 0, 1, max_tasks if max_tasks < shard.num_tasks else None, shard.first_task)


def _prepare(
    config: RunConfig, compute_dtype: str, hosts: Hosts, stream_path: str, folder: str, stream: StreamIdentity
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
        identity=_run_identity(
            config, backend, model, capture, compute_dtype, digest, reduction, _parts(hosts, config)
        ),
        stream=stream,
        tokenizer=tokenizer,
        selection=selection,
        facts=facts,
        reduction=reduction,
        hosts=hosts,
    )


def checked_selection(config: RunConfig, capture: Capture) -> Selection | None:
    """The selection of a run. Raises UsageError where it needs a site that is not captured."""
    selection = config.selection
    if selection is not None and selection.needs_norms and not set(NORM_SITES) & set(capture.sites):
        raise UsageError(
            f"--exclude_norm_outliers needs norms of the residual stream: also capture one of {', '.join(NORM_SITES)}"
        )
    return selection


def checked_reduction(config: RunConfig, capture: Capture, model: ModelShape) -> Reduction | None:
    """The reduction of a run, with its matrix loaded. Raises UsageError where it does not fit the captured sites."""
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
    # It would be one scale per row under another name. The default block is for rows of any width.
    if (config.quantize_block or 0) > widest:
        raise UsageError(
            f"--quantize_block {config.quantize_block}: no row has more than {widest} values: "
            "pass 0 for one scale per row"
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
            f"--exclude_tokens {config.exclude_tokens[0]} needs a tokenizer to know these tokens: {error}"
        ) from error
    for kind in config.exclude_tokens:
        if kind in facts.ids and not facts.ids[kind]:
            logging.warning("--exclude_tokens %s: the tokenizer has no such token, so no token is excluded", kind)
    return facts


def _run_identity(
    config: RunConfig,
    backend: Backend,
    model: ModelShape,
    capture: Capture,
    compute_dtype: str,
    tokenizer: str | None,
    reduction: Reduction | None,
    parts: int,
) -> RunIdentity:
    return RunIdentity(
        # The digest identifies the weights; the revision only names where they were found.
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


# run.json is untrusted.
_MAX_PARTS = 1 << 16


def _parts(hosts: Hosts, config: RunConfig) -> int:
    """The number of parts of each window: as in the output if it exists, else one for each host.

    So a slice of another size, or a single machine, can continue a run whose slice was lost.
    """

    def stored_parts() -> int:
        try:
            parts = json.loads(open_stores(config).primary.read_bytes(RUN_FILE)).get("parts", 1)
        except FileNotFoundError:
            return hosts.count
        except (ValueError, AttributeError):
            return hosts.count  # the comparison of identities reports it
        return parts if type(parts) is int and 1 <= parts <= _MAX_PARTS else hosts.count

    parts = hosts.broadcast("parts", stored_parts)
    if parts < hosts.count:
        logging.warning(
            "%s: windows have %d parts, so %d of %d hosts are idle", RUN_FILE, parts, hosts.count - parts, hosts.count
        )
    elif parts > hosts.count:
        logging.info("%s: windows have %d parts, which %d hosts compute in turn", RUN_FILE, parts, hosts.count)
    if parts > 1 and config.uploads and config.local_copy_stays:
        logging.info("no local copy is kept: each host of a slice would have only its own parts")
    return parts
