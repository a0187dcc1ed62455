"""The options of `mean`; light to import, so that `--help` is quick."""

from dataclasses import dataclass

from analysis.mean_vectors.modes import modes_of
from core.base.errors import UsageError
from core.streams.options import TextUnit

DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class MeanOptions:
    """Every option of `mean`; the flags of the command have the same names."""

    data: tuple[str, ...]
    model_path: str
    output: str
    layers: tuple[int, ...] | None = None
    mode: str = "short"
    num_samples: int | None = None
    seed: int | None = None
    batch_size: int = 200
    column: str = "text"
    split: str = "train"
    config: str | None = None
    text_unit: TextUnit = "line"
    max_seq_length: int | None = None
    overlong: str = "truncate"
    max_failed: int | None = None
    overwrite: bool = False
    revision: str | None = None
    backend: str = "auto"
    compute_dtype: str = "auto"
    trust_remote_code: bool = False
    rows_per_step: int = 4

    def validate(self) -> None:
        """Raises UsageError for a value that no run could have."""
        modes_of(self.mode)
        if not self.data:
            raise UsageError("data: name at least one source of texts")
        for name in ("num_samples", "batch_size", "max_seq_length", "rows_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: must be 1 or more")
        if self.max_failed is not None and self.max_failed < 0:
            raise UsageError(f"--max_failed {self.max_failed}: must be 0 or more")
        if self.overlong not in ("truncate", "refuse"):
            raise UsageError(f"--overlong {self.overlong}: must be truncate or refuse")
        if self.compute_dtype not in ("auto", "float32", "bfloat16"):
            raise UsageError(f"--compute_dtype {self.compute_dtype}: must be auto, float32 or bfloat16")
