"""Extracts the activations of a language model over a dataset: the main job. See README.md."""

import argparse
import json
from dataclasses import fields
from typing import Any

from absl import logging
from absl.flags import argparse_flags

from core.command_line import log_to_file, run_command
from core.formats import DTYPES, FORMATS
from qwen2_jax.taps import SITES


def build_parser() -> argparse_flags.ArgumentParser:
    """All flags, in groups; their defaults are those of `core.run_config.RunConfig`."""
    # A flag that is not given is absent, so that RunConfig alone knows the defaults.
    parser = argparse_flags.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS)
    _add_model_flags(parser.add_argument_group("model"))
    _add_data_flags(parser.add_argument_group("dataset and prompts"))
    _add_capture_flags(parser.add_argument_group("what is captured"))
    _add_output_flags(parser.add_argument_group("output"))
    _add_worker_flags(parser.add_argument_group("workers and resume"))
    return parser


def _add_model_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_path", help="HF folder, .gguf file or hub id (default Qwen/Qwen2.5-0.5B)")
    add("--revision", help="hub revision: a branch, tag or commit")
    add("--tokenizer_path", help="where the tokenizer is, when not with the model")
    add(
        "--compute_dtype", choices=("auto", "float32", "bfloat16"), help="auto: bfloat16 on TPU and GPU, float32 on CPU"
    )
    add("--batch_size", type=int, help="rows per step and device (default 4)")
    add("--no_pack", dest="pack", action="store_false", help="one sample to a row, padded, instead of packing")
    add("--compilation_cache_dir", help="compiled programs are kept here (default ~/.cache/qwen2_jax/compiled)")


def _add_data_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--dataset_path", help="the stream: JSONL, plain, .gz or .zst, or one shard's folder, local or gs://")
    add("--use_sharded_dataset", action="store_true", help="claim shard after shard of a dataset until none is left")
    add("--sharded_dataset_dir", help="made by create_dataset_streams.py --sharded, local or gs://")
    add("--preferred_shard_id", type=int, metavar="N", help="claim this shard first if it is free")
    add("--max_tasks", type=int, help="at most this many lines of the stream or of the whole dataset")
    add("--max_bad_records", type=int, help="bad records to set aside instead of stopping at the first (default 0)")
    add("--grid_encoder", help="for ARC tasks, such as GridShapeEncoder(RowNumberEncoder(MinimalGridEncoder()))")
    add("--prompt_version", help="for ARC tasks (default output-from-examples-v0)")
    add("--predictions_per_task", type=int, help="augmented prompts of each ARC task (default 8)")
    add("--random_seed", type=int, help="of the augmentations (default 42)")
    add("--max_seq_length", type=int, help="tokens of a sample at most (default 2048)")
    add("--overlong", choices=("truncate", "refuse"), help="what happens to longer samples (default truncate)")


def _add_capture_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--layers_to_extract", type=int, nargs="+", metavar="LAYER", help="block numbers from 0 (default all)")
    add("--activation_type", nargs="+", choices=tuple(SITES), help="one site or several (default residual)")
    add("--dtype", choices=tuple(DTYPES), help="stored dtype (default float16)")


def _add_output_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--output_dir", help="local folder or gs:// URL (default ./activations)")
    add("--format", choices=tuple(FORMATS), help="of the shards (default pickle)")
    add("--shard_size_gb", type=float, help="a shard ends where it reaches this size uncompressed (default 1.0)")
    add("--compress_shards", action="store_true", help="gzip pickle shards (default)")
    add("--no_compress_shards", dest="compress_shards", action="store_false", help="leave pickle shards uncompressed")
    add("--upload_to_gcs", action="store_true", help="upload while the run goes on; a shard counts once it is uploaded")
    add("--gcs_bucket", help="bucket to upload to; with --use_sharded_dataset it implies --upload_to_gcs")
    add("--gcs_prefix", help="folder in the bucket (default activations)")
    add("--delete_local_after_upload", action="store_true", help="keep no local copy")
    add("--json", action="store_true", help="print one JSON object on stdout at the end")
    add("--log_file", help="also write what is reported to this file")
    add("--plan", action="store_true", help="print what the run will cost, after timing one step, and stop")
    add("--verbose", action="store_true", default=False, help="debug messages, and stack traces of errors")


def _add_worker_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--worker_id", type=int, help="names the output folder tpu_<id> (default TPU_WORKER_ID, WORKER_ID, 0)")
    add("--machine_id", type=int, help="take lines with line %% total_machines == machine_id (default 0)")
    add("--total_machines", type=int, help="how many machines share the stream (default 1)")
    add("--enable_checkpointing", action="store_true", help="write the local checkpoint file (default)")
    add("--no_checkpointing", dest="enable_checkpointing", action="store_false", help="do not write it")
    add("--checkpoint_dir", help="where the checkpoint file lies (default ./checkpoints)")
    add("--claim_heartbeat_s", type=float, help="seconds between signs of life for a claimed shard (default 20)")
    add("--claim_ttl_s", type=float, help="a claim without a sign of life for so long is taken over (default 90)")
    add("--multihost", action="store_true", help="join the other hosts of a pod slice")
    add("--coordinator_address", help="host:port of host 0; found by JAX on a TPU VM")
    add("--host_id", type=int, help="number of this host; found by JAX on a TPU VM")
    add("--num_hosts", type=int, help="hosts of the slice; found by JAX on a TPU VM")


def extract(args: argparse.Namespace) -> int:
    """Runs the job; what people read goes to stderr, the JSON object of --json to stdout."""
    from core.run_config import RunConfig, default_worker_id

    known = {field.name for field in fields(RunConfig)}
    values = vars(args)
    # On a pod slice the variable numbers the hosts, which --multihost does too.
    if "worker_id" not in values and "multihost" not in values:
        values["worker_id"] = default_worker_id()
    flags: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items() if name in known
    }
    config = RunConfig(**flags)

    from core.runner import run

    log_to_file(config.log_file)
    result = run(config)
    for line in result.lines():
        logging.info(line)
    if config.json:
        print(json.dumps(result.to_json()))
    return result.exit_code


def main() -> None:
    """The console script."""
    run_command(extract, build_parser)


if __name__ == "__main__":
    main()
