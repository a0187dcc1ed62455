"""The options of making streams; light to import, so that `--help` is quick."""

from dataclasses import dataclass
from typing import Literal

TextUnit = Literal["line", "paragraph", "file"]
DEFAULT_COLUMN = "examples"
DEFAULT_CHUNK_MB = 64.0


@dataclass(frozen=True)
class StreamOptions:
    """The options of `create_streams` and `create_sharded_dataset`; the flags of the command."""

    dataset_name: str
    output_dir: str
    num_streams: int = 1
    num_shards: int = 1
    chunk_size_mb: float = DEFAULT_CHUNK_MB
    column_name: str = DEFAULT_COLUMN
    id_column: str = "task_id"
    drop_columns: tuple[str, ...] = ()
    split: str = "train"
    config: str | None = None
    text_unit: TextUnit = "line"
    max_samples: int | None = None
    skip_empty: bool = False
    overwrite: bool = False
