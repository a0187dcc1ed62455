"""What decides the bytes of a run: the identity shared by all workers, and the stream one worker reads.

Both are written into the output folder once, create-only. A run that would write something else into the same folder
is refused with the names of the fields that differ.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from core.base.canonical_json import canonical_json


@dataclass(frozen=True)
class RunIdentity:
    """Everything but the stream that a stored byte depends on (on one kind of hardware and batch size).

    Attributes:
      model: family and content digest; independent of where the model lies.
      tokenizer: content digest, or None when the stream holds token ids.
      prompts: grid encoder, prompt version, predictions per task and seed.
      layers: block indices, ascending, of the sites that every block has.
      dtype: stored dtype; compute_dtype: what the forward pass runs in.
      shard_bytes: a window ends where the stored bytes of its largest file reach this.
      overlong: what happens to samples longer than max_seq_length.
      selection: which tokens are stored; None: all.
      reduction: what is done to them before they are; None: nothing.
      parts: of each window, with files of their own; as many hosts as that can share a window.
    """

    model: dict[str, Any]
    tokenizer: str | None
    prompts: dict[str, Any]
    sites: tuple[str, ...]
    layers: tuple[int, ...]
    dtype: str
    compute_dtype: str
    format: str
    compress: bool
    shard_bytes: int
    max_seq_length: int
    overlong: str
    selection: dict[str, Any] | None = None
    backend: str = "jax"
    reduction: dict[str, Any] | None = None
    parts: int = 1

    def to_json(self) -> dict[str, Any]:
        """As it is stored and hashed: the backend where it is not JAX, reduction and parts where there are some."""
        fields = asdict(self)
        if self.backend == "jax":
            del fields["backend"]
        if self.reduction is None:
            del fields["reduction"]
        if self.parts == 1:
            del fields["parts"]
        return json.loads(canonical_json(fields))


@dataclass(frozen=True)
class StreamIdentity:
    """Which samples one output folder holds: the stream's identity and the part of it that is taken.

    Attributes:
      identity: name, bytes and crc32c of the stream file.
      machine_id, total_machines: lines with line_position % total_machines == machine_id are taken.
      max_tasks: at most this many of them.
      first_position: of the stream's first line; not 0 for all but the first shard of a dataset.
      max_bad_records is no part of it: it decides whether a run stops, never what is written.
    """

    identity: dict[str, Any]
    machine_id: int
    total_machines: int
    max_tasks: int | None
    first_position: int = 0

    def to_json(self) -> dict[str, Any]:
        """The identity as it is stored and hashed."""
        return json.loads(canonical_json(asdict(self)))


def differing_fields(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> list[str]:
    """One `field: stored there, wanted here` for each leaf that differs."""
    differences = []
    for key in sorted(stored.keys() | wanted.keys()):
        there, here = stored.get(key), wanted.get(key)
        if isinstance(there, dict) and isinstance(here, dict):
            differences += differing_fields(there, here, f"{prefix}{key}.")
        elif there != here:
            differences.append(f"{prefix}{key}: {_short(there)} there, {_short(here)} here")
    return differences


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
