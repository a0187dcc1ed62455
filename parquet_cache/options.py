"""The options of `prepare`; light to import, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

from core.base.errors import UsageError

DEFAULT_BATCH_SIZE = 8
MOST_TEXTS = 1 << 10
"""The largest batch that `auto_find_batch_size` tries."""
Device = Literal["auto", "cpu", "cuda", "tpu"]
Backend = Literal["auto", "jax", "torch"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
StoredDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class PrepareOptions:
    """The flags of the command by name.

    Attributes:
      layers: block numbers from 0, kept in ascending order; None: all.
      n_pos: the most tokens of a text; None: the positions that the model knows.
      batch_size: texts a batch; with `auto_find_batch_size` the most that are tried.
      max_shards_created: None: as many as the rows make.
    """

    model_checkpoint: str
    ds_repo: str
    ds_input_column: str
    output_dir: str
    ds_config: str | None = None
    ds_split: str = "train"
    ds_label_columns: tuple[str, ...] = ()
    ds_filter: str | None = None
    deduplicate: bool = False
    ds_shuffle_seed: int | None = None
    ds_sample: int | None = None
    sort_ds_by_len: bool = False
    sort_ds_reversed: bool = False
    max_bad_records: int = 0
    layers: tuple[int, ...] | None = None
    with_embedding: bool = False
    n_pos: int | None = None
    dtype: StoredDtype = "float16"
    batch_size: int | None = None
    auto_find_batch_size: bool = False
    batches_per_shard: int = 50
    max_shards_created: int | None = None
    device: Device = "auto"
    backend: Backend = "auto"
    compute_dtype: ComputeDtype = "auto"
    revision: str | None = None
    tokenizer_path: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for values that no run can have."""
        for name in ("n_pos", "batch_size", "batches_per_shard", "max_shards_created", "ds_sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: must be at least 1")
        for name in ("ds_shuffle_seed", "max_bad_records"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"--{name} {value}: must be 0 or more")
        if self.sort_ds_reversed and not self.sort_ds_by_len:
            raise UsageError("--sort_ds_reversed reverses the order of --sort_ds_by_len: pass both")
        for name in {"hidden_states", "input_ids"}.intersection(self.ds_label_columns):
            raise UsageError(f"--ds_label_columns {name}: the output has a column of that name of its own")
        twice = {name for name in self.ds_label_columns if self.ds_label_columns.count(name) > 1}
        if twice:
            raise UsageError(f"--ds_label_columns: {', '.join(sorted(twice))} is given twice")

    @property
    def keeps_source_order(self) -> bool:
        """Whether the first rows of the source are the first rows of the output."""
        return not (
            self.deduplicate or self.sort_ds_by_len or self.ds_shuffle_seed is not None or self.ds_sample is not None
        )
