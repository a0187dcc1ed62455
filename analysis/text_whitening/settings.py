"""What decides the stored chunks besides the texts, and what a folder says of it."""

from dataclasses import asdict, dataclass
from typing import Any

from analysis.whitening.token_filter import TokenFilter
from core.base.canonical_json import canonical_json
from core.base.errors import UsageError
from core.object_store import Created, ObjectStore
from core.object_store.single_file import read_json_object

SETTINGS_FILE = "processing_config.json"
DTYPES = ("float16", "float32")


@dataclass(frozen=True)
class TextSettings:
    """The settings of an output folder; a value that cannot be is a UsageError.

    Attributes:
      model: path or hub id. model_digest: of its content.
      seq_len: longer texts are cut, shorter ones padded on the right.
      exclude: kinds of tokens that count nowhere, see `TokenFilter`.
      dtype: of the whitened values.
    """

    model: str
    model_digest: str
    layer: int
    site: str
    seq_len: int
    chunk_size: int
    exclude: tuple[str, ...]
    dtype: str
    compute_dtype: str

    def __post_init__(self) -> None:
        if self.seq_len < 1 or self.chunk_size < 1:
            raise UsageError(f"seq_len {self.seq_len}, chunk_size {self.chunk_size}: both must be at least 1")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r}: numpy files hold one of {', '.join(DTYPES)}")
        TokenFilter(self.exclude)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"exclude": list(self.exclude)}


def claim_folder(store: ObjectStore, settings: TextSettings) -> None:
    """Writes the settings into the folder, once. Raises UsageError naming the fields if it has others."""
    data = canonical_json(settings.to_json())
    if store.create_bytes(SETTINGS_FILE, data) is not Created.ALREADY_DIFFERENT:
        return
    there = read_json_object(store, SETTINGS_FILE)
    differing = [name for name, value in settings.to_json().items() if there.get(name) != value]
    was = ", ".join(f"{name} was {there.get(name)!r}, is {getattr(settings, name)!r}" for name in differing)
    raise UsageError(f"{store.url} holds chunks of other settings: {was}: use another output_dir")
