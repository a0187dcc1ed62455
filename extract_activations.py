"""Extracts the activations of a language model over a dataset: the main job. See README.md.

In Python: `extract(model_path, dataset_path, …)`, `price(…)`, and `capture(model, texts, …)` in memory.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from absl import logging

from core.backends import BACKENDS
from core.base.arguments import checked_arguments, with_fields_of
from core.base.command_line import CommandParser, configure_logging, log_to_file, run_command
from core.base.dtypes import DTYPES
from core.in_memory.options import CaptureOptions
from core.reduce.reductions import QUANTIZATIONS, pool_spellings
from core.run.config import RunConfig, default_worker_id
from core.samples.selection import TOKEN_CHOICES, TOKEN_KINDS
from core.shards.formats import FORMATS
from qwen2_jax.taps import SITES

if TYPE_CHECKING:
    from core.in_memory.capturer import Activations
    from core.in_memory.given_samples import Sample
    from core.pricing.plan import PlanReport
    from core.pricing.tpu_estimate import StepEstimate
    from core.run.progress import HostExit, Summary
    from core.run.sharded_run import BeforeExtraction
    from qwen2_jax import Decoder

_COMPRESSIBLE = " or ".join(name for name, shard_format in FORMATS.items() if shard_format.compressible)


def build_parser() -> CommandParser:
    """All flags, in groups; their defaults are those of `core.run.config.RunConfig`."""
    # Flags that are not given are absent, so that only RunConfig has the defaults.
    parser = CommandParser(description=__doc__, argument_default=argparse.SUPPRESS)
    # Otherwise argparse takes `-8:` in `--positions -8:` for an unknown flag.
    parser._negative_number_matcher = re.compile(r"-[0-9.]+(:-?[0-9]*)?$")
    _add_model_flags(parser.add_argument_group("model"))
    _add_data_flags(parser.add_argument_group("dataset and prompts"))
    _add_capture_flags(parser.add_argument_group("capture"))
    _add_output_flags(parser.add_argument_group("output"))
    _add_worker_flags(parser.add_argument_group("workers and resume"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_path", help="HF folder, .gguf file or hub id (default Qwen/Qwen2.5-0.5B)")
    add("--revision", help="hub revision: a branch, tag or commit")
    add("--tokenizer_path", help="path of the tokenizer, if it is not with the model")
    add(
        "--backend",
        choices=BACKENDS,
        help="auto: JAX for the supported families, torch for any other (default auto)",
    )
    add(
        "--mesh",
        help="auto, 1d (a copy of the model on each device), 2d (one copy over all devices), DATAxMODEL (default auto)",
    )
    add("--trust_remote_code", action="store_true", help="run code that comes with a model; only with --backend torch")
    add(
        "--compute_dtype", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on TPU and GPU, float32 on CPU"
    )
    add("--batch_size", type=int, help="rows per step and device (default 4)")
    add("--no_pack", dest="pack", action="store_false", help="one padded sample per row, instead of packing")
    add("--compilation_cache_dir", help="cache of compiled programs (default ~/.cache/qwen2_jax/compiled)")
    add(
        "--weights_cache_dir",
        help="where scripts/convert_checkpoint.py put converted weights, local or gs:// "
        "(default ~/.cache/qwen2_jax/weights)",
    )


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset_path", help="the stream: JSONL, plain, .gz or .zst, or a dataset shard's folder, local or gs://")
    add("--use_sharded_dataset", action="store_true", help="claim one dataset shard after another until none is left")
    add("--sharded_dataset_dir", help="made by create_dataset_streams.py --sharded, local or gs://")
    add("--preferred_shard_id", type=int, metavar="N", help="claim this dataset shard first if it is free")
    add("--max_tasks", type=int, help="at most this many lines of the stream or of the whole dataset")
    add("--max_bad_records", type=int, help="bad records to set aside instead of stopping at the first (default 0)")
    add("--grid_encoder", help="for ARC tasks, such as GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    add("--prompt_version", help="for ARC tasks (default output-from-examples-v0)")
    add("--predictions_per_task", type=int, help="augmented prompts of each ARC task (default 8)")
    add("--random_seed", type=int, help="of the augmentations (default 42)")
    add("--max_seq_length", type=int, help="maximum tokens of a sample (default 2048)")
    add("--overlong", choices=("truncate", "refuse"), help="what to do with longer samples (default truncate)")


def _add_capture_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--layers_to_extract", type=int, nargs="+", metavar="LAYER", help="block numbers from 0 (default all)")
    add(
        "--activation_type",
        nargs="+",
        metavar="SITE",
        help=f"one or more of {', '.join(SITES)}, or names of TransformerLens or Hugging Face (default residual)",
    )
    add("--dtype", choices=tuple(DTYPES), help="stored dtype (default float16)")
    add("--project", metavar="FILE", help="(x - mean) @ matrix of a .npy, .npz or .safetensors, local or gs://")
    add(
        "--pool",
        nargs="+",
        metavar="POOL",
        help=f"store these vectors of each sample instead of its tokens: {', '.join(pool_spellings())}",
    )
    add("--topk", type=int, metavar="K", help="store the K largest magnitudes of each token or pool, with indices")
    add("--quantize", choices=tuple(QUANTIZATIONS), help="store quantized codes and scales")
    add(
        "--quantize_block", type=int, metavar="N", help="values that share a scale; 0: a whole row (default 32, fp8: 0)"
    )
    add("--exclude_tokens", nargs="+", choices=TOKEN_KINDS, help="kinds of tokens that are not stored")
    add("--positions", nargs="+", metavar="START:STOP", help="store only these tokens of a sample, as Python slices")
    add(
        "--exclude_norm_outliers",
        type=float,
        metavar="K",
        help="leave out tokens whose norm exceeds K times the median",
    )
    add("--max_tokens_per_sample", type=int, metavar="N", help="store at most N of the remaining tokens")
    add("--token_choice", choices=TOKEN_CHOICES, help="which N (default first); random uses --random_seed")


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", help="local folder or gs:// URL (default ./activations)")
    add("--format", choices=tuple(FORMATS), help="of the shards (default pickle)")
    add("--shard_size_gb", type=float, help="a shard ends where its uncompressed size reaches this (default 1.0)")
    add("--compress_shards", action="store_true", help=f"gzip the shards if --format is {_COMPRESSIBLE} (default)")
    add("--no_compress_shards", dest="compress_shards", action="store_false", help="do not gzip the shards")
    add("--upload_to_gcs", action="store_true", help="upload during the run; a shard is committed once it is uploaded")
    add("--gcs_bucket", help="bucket to upload to; with --use_sharded_dataset it implies --upload_to_gcs")
    add("--gcs_prefix", help="folder in the bucket (default activations)")
    add("--delete_local_after_upload", action="store_true", help="keep no local copy")
    add("--json", action="store_true", help="print one JSON object on stdout at the end")
    add("--log_file", help="also write the log to this file")
    add("--certify", type=int, metavar="N", help="first compare N samples with transformers in float32; needs torch")
    add("--certify_against", metavar="PATH", help="another copy of the model for transformers to load")
    add("--allow_unfaithful", action="store_true", help="extract even if --certify finds the activations wrong")
    add("--plan", action="store_true", help="print the price of the run, after timing one step, and stop")
    add(
        "--tpu_topology",
        metavar="TYPE:SHAPE",
        help="with --plan: the price of a step on these TPUs, such as v5e:8x8, by their compiler; needs no TPU, "
        "weights or dataset",
    )
    add("--verbose", action="store_true", default=False, help="debug messages, and stack traces of errors")


def _add_worker_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--worker_id", type=int, help="names the output folder tpu_<id> (default TPU_WORKER_ID, WORKER_ID, 0)")
    add("--machine_id", type=int, help="take lines with line %% total_machines == machine_id (default 0)")
    add("--total_machines", type=int, help="how many machines share the stream (default 1)")
    add("--enable_checkpointing", action="store_true", help="write the local checkpoint file (default)")
    add("--no_checkpointing", dest="enable_checkpointing", action="store_false", help="do not write it")
    add("--checkpoint_dir", help="folder of the checkpoint file (default ./checkpoints)")
    add("--claim_heartbeat_s", type=float, help="seconds between heartbeats for a claimed dataset shard (default 20)")
    add("--claim_ttl_s", type=float, help="a claim without a heartbeat for this long is taken over (default 90)")
    add("--claim_stall_s", type=float, help="without progress for this long, heartbeats stop (default 1800)")
    add("--stop_grace_s", type=float, help="seconds after SIGTERM to commit what is computed (default 15)")
    add("--multihost", action="store_true", help="work on every window together with the other hosts of a pod slice")
    add("--coordinator_address", help="host:port of host 0; found by JAX on a TPU VM")
    add("--host_id", type=int, help="index of this host, from 0; found by JAX on a TPU VM")
    add("--num_hosts", type=int, help="hosts of the slice; found by JAX on a TPU VM")
    add("--host_timeout_s", type=float, help="a host without a heartbeat for this long ends all others (default 60)")


# They decide how the command reports, and nothing of the run.
_OF_THE_COMMAND = ("json", "log_file", "verbose")


def _refuse_flags_of_the_command(flags: Mapping[str, Any]) -> None:
    from core.base.errors import UsageError

    if given := [name for name in _OF_THE_COMMAND if name in flags]:
        raise UsageError(f"{', '.join(given)}: flags of the command alone: use the returned value, and logging")


@with_fields_of(RunConfig, "plan", "tpu_topology", *_OF_THE_COMMAND)
def extract(
    model_path: str,
    dataset_path: str | None = None,
    *,
    layers_to_extract: int | Iterable[int] | None = None,
    activation_type: str | Iterable[str] = "residual",
    output_dir: str = "./activations",
    quiet: bool = False,
    **flags: Any,
) -> "Summary | HostExit":
    """Extracts activations into files, as the command does, and returns a summary: counts, rates and the output.

    Args:
      model_path: a Hugging Face folder, hub id or .gguf file.
      dataset_path: the stream; None with `use_sharded_dataset=True, sharded_dataset_dir=…`.
      layers_to_extract: block numbers from 0; None: all.
      quiet: without the progress lines that the command writes to stderr.
      flags: every other flag of the command by its name, with the types and defaults of `core.run.config.RunConfig`.

    Raises UsageError for invalid arguments, ModelError for the model, RunError for data, disk and storage.
    """
    from core.base.errors import UsageError

    if flags.keys() & {"plan", "tpu_topology"}:
        raise UsageError("plan, tpu_topology: call `price` to price a run")
    _refuse_flags_of_the_command(flags)
    if not quiet:
        configure_logging()
    named = {"layers_to_extract": layers_to_extract, "activation_type": activation_type, "output_dir": output_dir}
    return _extract(run_config(model_path=model_path, dataset_path=dataset_path, **named, **flags))


@with_fields_of(CaptureOptions)
def capture(
    model: "str | Decoder", samples: "Sample | Sequence[Sample]", *, progress: bool = False, **options: Any
) -> "Activations":
    """The activations of texts or token ids in memory: site -> layer -> one (T, D) array a sample; nothing is written.

    T is the number of tokens of the sample, D the width of the site; with `pool` the arrays are (P, D), in the order of
    the pools. Samples are packed into rows and split over the devices of this process as in a run. The whole result is
    held in this host's memory.

    Args:
      model: a Hugging Face folder, hub id or .gguf file, of which only the needed layers are loaded; or a model from
        `qwen2_jax.load_model`, which runs in its own dtype on its own devices.
      samples: one or several texts or lists of token ids. Texts are tokenized with the tokenizer's defaults.
      progress: shows a bar on stderr.
      options: `layers`, `sites`, `pool`, `dtype` and the other fields of `core.in_memory.options.CaptureOptions`.

    Raises UsageError for invalid arguments, ModelError for the model, RunError for values that are not finite or do
    not fit `dtype`.
    """
    from core.in_memory.capturer import load_capturer

    return load_capturer(model, **options)(samples, progress=progress)


@with_fields_of(RunConfig, "plan", *_OF_THE_COMMAND)
def price(model_path: str, dataset_path: str | None = None, **flags: Any) -> "PlanReport | StepEstimate | HostExit":
    """The price of `extract` with these arguments, as `--plan` prints it; nothing is written. Raises as `extract` does.

    With `tpu_topology="v5e:8x8"`: the price of a step on these TPUs, by their compiler.
    """
    _refuse_flags_of_the_command(flags)
    return _price(run_config(**{"model_path": model_path, "dataset_path": dataset_path} | flags | {"plan": True}))


@with_fields_of(RunConfig)
def run_config(**flags: Any) -> RunConfig:
    """The flags as one checked value. Raises UsageError for a flag that does not exist or cannot have this value."""
    return RunConfig(**checked_arguments(RunConfig, flags))


def _extract(config: RunConfig) -> "Summary | HostExit":
    from core.run.runner import run

    return run(config, _certifier() if config.certify else None)


def _certifier() -> "BeforeExtraction":
    """The function that certifies a run before it extracts anything; raises RunError when torch is not installed."""
    from analysis.certificate.certification import require_reference

    require_reference("--certify: the reference")

    from analysis.certificate.certified_runs import certify_run

    return certify_run


def _price(config: RunConfig) -> "PlanReport | StepEstimate | HostExit":
    if config.tpu_topology is not None:
        from core.pricing.tpu_estimate import estimate_run

        return estimate_run(config, config.tpu_topology)
    from core.pricing.plan import price_run

    return price_run(config)


def run_flags(args: argparse.Namespace) -> int:
    """The command: logs go to stderr, the JSON object of --json to stdout."""
    known = {field.name for field in fields(RunConfig)}
    flags = {name: value for name, value in vars(args).items() if name in known}
    # On a pod slice TPU_WORKER_ID is the index of the host; all hosts together are one worker.
    if "worker_id" not in flags and "multihost" not in flags:
        flags["worker_id"] = default_worker_id()
    config = run_config(**flags)

    log_to_file(config.log_file)
    if config.multihost:
        from core.hosts.guarded_process import fork_under_guard

        code = fork_under_guard()
        if code is not None:
            return code

    result = _price(config) if config.plan else _extract(config)
    for line in result.lines():
        logging.info(line)
    printed = result.to_json()
    if config.json and printed is not None:
        print(json.dumps(printed))
    return result.exit_code


def main() -> None:
    """The console command."""
    run_command(run_flags, build_parser)


if __name__ == "__main__":
    main()
