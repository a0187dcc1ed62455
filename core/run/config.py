"""The command line of the main job as one frozen value, with the checks that need no I/O."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arc24.encoders import DEFAULT_GRID_ENCODER
from arc24.prompting import DEFAULT_PROMPT_VERSION
from core.backends import BACKENDS
from core.base.dtypes import DTYPES
from core.base.errors import UsageError
from core.reduce.reductions import DEFAULT_BLOCK, QUANTIZATIONS, Quantization, parse_pool
from core.samples.selection import TOKEN_CHOICES, TOKEN_KINDS, Selection, parse_positions
from core.shards.formats import FORMATS, require_format
from core.step.mesh_flag import is_mesh

DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B"
BYTES_PER_GB = 1 << 30
_CHOICES = {
    "backend": BACKENDS,
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "overlong": ("truncate", "refuse"),
}
MAX_WAIT_S = 365 * 24 * 3600.0
"""Limit of all wait flags: locks accept at most a few hundred years, and a lease stores its times as JSON numbers."""


@dataclass(frozen=True)
class RunConfig:
    """Every flag of `extract_activations.py`; see its help texts."""

    model_path: str = DEFAULT_MODEL
    revision: str | None = None
    backend: str = "auto"
    trust_remote_code: bool = False
    mesh: str = "auto"
    certify: int = 0
    certify_against: str | None = None
    allow_unfaithful: bool = False
    tokenizer_path: str | None = None
    dataset_path: str | None = None
    use_sharded_dataset: bool = False
    sharded_dataset_dir: str | None = None
    preferred_shard_id: int | None = None
    claim_heartbeat_s: float = 20.0
    claim_ttl_s: float = 90.0
    claim_stall_s: float = 1800.0
    stop_grace_s: float = 15.0
    max_tasks: int | None = None
    machine_id: int = 0
    total_machines: int = 1
    max_bad_records: int = 0
    grid_encoder: str = DEFAULT_GRID_ENCODER
    prompt_version: str = DEFAULT_PROMPT_VERSION
    predictions_per_task: int = 8
    random_seed: int = 42
    max_seq_length: int = 2048
    overlong: str = "truncate"
    layers_to_extract: tuple[int, ...] | None = None
    activation_type: tuple[str, ...] = ("residual",)
    exclude_tokens: tuple[str, ...] = ()
    positions: tuple[str, ...] = ()
    exclude_norm_outliers: float | None = None
    max_tokens_per_sample: int | None = None
    token_choice: str = "first"
    dtype: str = "float16"
    project: str | None = None
    pool: tuple[str, ...] = ()
    topk: int | None = None
    quantize: str | None = None
    quantize_block: int | None = None
    compute_dtype: str = "auto"
    batch_size: int = 4
    pack: bool = True
    output_dir: str = "./activations"
    format: str = "pickle"
    compress_shards: bool = True
    shard_size_gb: float = 1.0
    upload_to_gcs: bool = False
    gcs_bucket: str | None = None
    gcs_prefix: str = "activations"
    delete_local_after_upload: bool = False
    worker_id: int = 0
    enable_checkpointing: bool = True
    checkpoint_dir: str = "./checkpoints"
    multihost: bool = False
    coordinator_address: str | None = None
    host_id: int | None = None
    num_hosts: int | None = None
    host_timeout_s: float = 60.0
    compilation_cache_dir: str = "~/.cache/qwen2_jax/compiled"
    weights_cache_dir: str = "~/.cache/qwen2_jax/weights"
    json: bool = False
    log_file: str | None = None
    plan: bool = False
    tpu_topology: str | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("predictions_per_task", "max_seq_length", "batch_size", "total_machines"):
            self._require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("max_bad_records", "random_seed", "worker_id"):
            self._require(getattr(self, name) >= 0, name, "must not be negative")
        self._require(0 <= self.stop_grace_s <= MAX_WAIT_S, "stop_grace_s", "must be between 0 and a year")
        self._require(3 <= self.host_timeout_s <= MAX_WAIT_S, "host_timeout_s", "must be between 3 and a year")
        self._require(self.max_tasks is None or self.max_tasks >= 1, "max_tasks", "must be at least 1")
        self._require(0 < self.shard_size_gb < math.inf, "shard_size_gb", "must be above 0 and finite")
        self._require(0 <= self.machine_id < self.total_machines, "machine_id", "must lie in 0..total_machines-1")
        for name, choices in _CHOICES.items():
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}")
        self._require(self.dtype in DTYPES, "dtype", f"must be one of {', '.join(DTYPES)}")
        self._require(is_mesh(self.mesh), "mesh", "must be auto, 1d, 2d or DATAxMODEL, such as 2x4")
        self._check_format()
        self._check_hosts()
        self._check_certificate()
        self._check_selection()
        self._check_reduction()
        self._check_dataset()
        scheme = self.output_dir.partition("://")[0] if self.output_is_remote else "gs"
        self._require(scheme in ("gs", "gcs"), "output_dir", "must be a local folder or a gs:// URL")
        if self.upload_to_gcs and not self.gcs_bucket:
            raise UsageError("--upload_to_gcs needs --gcs_bucket")
        if self.upload_to_gcs and self.output_is_remote:
            raise UsageError(
                f"--output_dir {self.output_dir} is already remote: leave out --upload_to_gcs, or pass a local folder"
            )
        if not self.output_is_remote and self.local_output.exists() and not self.local_output.is_dir():
            raise UsageError(f"--output_dir {self.output_dir} is a file: pass a folder")
        if self.delete_local_after_upload and not self.uploads:
            raise UsageError("--delete_local_after_upload needs --upload_to_gcs: it would delete the only copy")

    def _check_format(self) -> None:
        self._require(self.format in FORMATS, "format", f"must be one of {', '.join(FORMATS)}")
        require_format(self.format)
        dtypes = FORMATS[self.format].dtypes
        if self.quantize is None and self.dtype not in dtypes:
            flags = " or ".join(f"--dtype {dtype}" for dtype in DTYPES if dtype in dtypes)
            raise UsageError(f"--format {self.format} has no {self.dtype}: use {flags}, or --format safetensors")
        if self.quantize in QUANTIZATIONS and QUANTIZATIONS[self.quantize].name not in dtypes:
            raise UsageError(
                f"--format {self.format} has no {self.quantize}: use --quantize int8, or --format safetensors"
            )

    def _check_hosts(self) -> None:
        for name in ("coordinator_address", "num_hosts", "host_id"):
            self._require(self.multihost or getattr(self, name) is None, name, "needs --multihost")
        address = self.coordinator_address
        self._require(
            address is None or re.fullmatch(r".+:[0-9]{1,5}", address) is not None,
            "coordinator_address",
            "must be host:port, such as 10.0.0.1:8476",
        )
        hosts, host = self.num_hosts, self.host_id
        self._require(hosts is None or hosts >= 1, "num_hosts", "must be at least 1")
        self._require(host is None or 0 <= host < (hosts or math.inf), "host_id", "must lie in 0..num_hosts-1")

    def _check_certificate(self) -> None:
        self._require(self.certify >= 0, "certify", "must not be negative")
        if not self.certify and self.certify_against is not None:
            raise UsageError("--certify_against needs --certify")
        if not self.certify and self.allow_unfaithful:
            raise UsageError("--allow_unfaithful needs --certify")

    def _check_selection(self) -> None:
        unknown = [kind for kind in self.exclude_tokens if kind not in TOKEN_KINDS]
        if unknown:
            raise UsageError(f"--exclude_tokens {unknown[0]}: must be one of {', '.join(TOKEN_KINDS)}")
        factor, most = self.exclude_norm_outliers, self.max_tokens_per_sample
        # At a factor of 1 half of all tokens would be outliers.
        self._require(factor is None or 1 < factor < math.inf, "exclude_norm_outliers", "must be above 1 and finite")
        self._require(most is None or most >= 1, "max_tokens_per_sample", "must be at least 1")
        self._require(self.token_choice in TOKEN_CHOICES, "token_choice", f"must be one of {', '.join(TOKEN_CHOICES)}")
        self._require(self.token_choice == "first" or most is not None, "token_choice", "needs --max_tokens_per_sample")
        for text in self.positions:
            parse_positions(text)

    def _check_reduction(self) -> None:
        pools = [parse_pool(text) for text in self.pool]
        twice = [pool for place, pool in enumerate(pools) if pool in pools[:place]]
        if twice:
            raise UsageError(f"--pool {twice[0]}: it is given twice")
        self._require(self.topk is None or self.topk >= 1, "topk", "must be at least 1")
        kinds, block = (None, *QUANTIZATIONS), self.quantize_block
        self._require(self.quantize in kinds, "quantize", f"must be one of {', '.join(QUANTIZATIONS)}")
        self._require(block is None or block >= 0, "quantize_block", "must not be negative")
        self._require(block is None or self.quantize is not None, "quantize_block", "needs --quantize")
        if self.quantize is not None and self.dtype != RunConfig.dtype:
            raise UsageError(
                f"--dtype {self.dtype}: --quantize {self.quantize} stores {self.quantize}: leave --dtype out"
            )

    def _check_dataset(self) -> None:
        if self.tpu_topology is not None:
            self._require(self.plan, "tpu_topology", "needs --plan: it estimates a step and runs nothing")
            self._require(
                self.backend != "torch", "tpu_topology", "torch does not run on TPUs: leave out --backend torch"
            )
            self._require(not self.certify, "certify", "leave it out with --tpu_topology, which runs nothing")
            if self.multihost:
                raise UsageError("--multihost: leave it out with --tpu_topology: all hosts of a slice are estimated")
            return
        if not self.use_sharded_dataset:
            for name in ("sharded_dataset_dir", "preferred_shard_id"):
                self._require(getattr(self, name) is None, name, "needs --use_sharded_dataset")
            if self.dataset_path is None:
                raise UsageError(
                    "--dataset_path is missing: pass the stream to extract, such as data/streams/stream_000.jsonl"
                )
            return
        if self.sharded_dataset_dir is None:
            raise UsageError("--use_sharded_dataset needs --sharded_dataset_dir")
        self._require(self.dataset_path is None, "dataset_path", "leave it out with --use_sharded_dataset")
        self._require(self.total_machines == 1, "total_machines", "leave it out: workers claim the dataset's shards")
        self._require((self.preferred_shard_id or 0) >= 0, "preferred_shard_id", "must not be negative")
        for name in ("claim_heartbeat_s", "claim_ttl_s", "claim_stall_s"):
            self._require(0 < getattr(self, name) <= MAX_WAIT_S, name, "must be above 0 and at most a year")
        self._require(self.claim_ttl_s >= 2 * self.claim_heartbeat_s, "claim_ttl_s", "must be two heartbeats or more")

    def _require(self, holds: bool, name: str, rule: str) -> None:
        if not holds:
            raise UsageError(f"--{name} {getattr(self, name)}: {rule}")

    @property
    def selection_flags(self) -> tuple[str, ...]:
        """The given flags that leave tokens out."""
        names = ("exclude_tokens", "positions", "exclude_norm_outliers", "max_tokens_per_sample")
        return tuple(name for name in names if getattr(self, name))

    @property
    def selection(self) -> Selection | None:
        """Which tokens are stored; None: all. Equivalent flags give equal selections."""
        rules = Selection(
            exclude=tuple(kind for kind in TOKEN_KINDS if kind in self.exclude_tokens),
            positions=tuple(sorted({parse_positions(text) for text in self.positions}, key=str)),
            outlier_factor=self.exclude_norm_outliers,
            max_tokens=self.max_tokens_per_sample,
            choice=self.token_choice,
            seed=self.random_seed,
        )
        return None if rules == Selection(seed=self.random_seed) else rules

    @property
    def quantization(self) -> Quantization | None:
        """How values are quantized; None: stored in --dtype."""
        if self.quantize is None:
            return None
        block = DEFAULT_BLOCK[self.quantize] if self.quantize_block is None else self.quantize_block
        return Quantization(self.quantize, block)

    @property
    def shard_bytes(self) -> int:
        """Bytes at which a window ends."""
        return max(1, int(self.shard_size_gb * BYTES_PER_GB))

    @property
    def output_is_remote(self) -> bool:
        """Whether --output_dir itself is in a bucket."""
        return "://" in self.output_dir and not self.output_dir.startswith("file://")

    @property
    def uploads(self) -> bool:
        """Whether windows are committed in a bucket. --gcs_bucket is enough for workers that claim shards."""
        claims_in_bucket = self.use_sharded_dataset and self.gcs_bucket is not None and not self.output_is_remote
        return self.upload_to_gcs or claims_in_bucket

    @property
    def local_output(self) -> Path:
        """The local folder that --output_dir names."""
        return Path(self.output_dir.removeprefix("file://")).expanduser()

    @property
    def local_copy_stays(self) -> bool:
        """Whether all stored files also stay on the local disk."""
        return not self.output_is_remote and not self.delete_local_after_upload

    @property
    def gzipped(self) -> bool:
        """Whether shard files are compressed."""
        return self.compress_shards and FORMATS[self.format].compressible

    def metrics_path_of(self, folder: str, host: int = 0) -> Path:
        """The path of metrics.jsonl: beside the shards in `folder` when they are local, else beside the checkpoint.

        host: of a slice; each host has its own file.
        """
        of_host = f"_host_{host}" if host else ""
        if self.local_copy_stays:
            return self.local_output / folder / f"metrics{of_host}.jsonl"
        return Path(self.checkpoint_dir) / f"metrics_worker_{self.worker_id}{of_host}.jsonl"

    @property
    def folder(self) -> str:
        """The worker's folder in the output."""
        return f"tpu_{self.worker_id}"

    @property
    def gcs_url(self) -> str:
        """The URL of the uploads."""
        return "/".join(part for part in (f"gs://{self.gcs_bucket}", self.gcs_prefix.strip("/")) if part)


def default_worker_id(environment: Mapping[str, str] = os.environ) -> int:
    """TPU_WORKER_ID, else WORKER_ID, else 0. Raises UsageError when the variable is not a number."""
    for name in ("TPU_WORKER_ID", "WORKER_ID"):
        value = environment.get(name, "")
        if value:
            if not value.isdecimal():
                raise UsageError(f"{name}={value} in the environment: must be a whole number, 0 or more")
            return int(value)
    return 0
