"""The identity of a run, shared by all workers, and of the stream that one worker reads: they decide the bytes written.

Both are written into the output folder once, create-only. A run with a different identity in the same folder is
refused, naming the fields that differ.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any

from core.base.canonical_json import canonical_json


@dataclass(frozen=True)
class RunIdentity:
    """Everything but the stream that a stored byte depends on (for one kind of hardware and batch size).

    Attributes:
      model: family and content digest; independent of the model's path.
      tokenizer: content digest, or None when the stream holds token ids.
      prompts: grid encoder, prompt version, predictions per task and seed.
      layers: block indices, ascending, of the sites that every block has.
      dtype: stored dtype; compute_dtype: dtype of the forward pass.
      shard_bytes: a window ends where the stored bytes of its largest file reach this.
      overlong: "truncate" or "refuse", for samples longer than max_seq_length.
      selection: which tokens are stored; None: all.
      reduction: how stored tokens are reduced; None: not at all.
      parts: of each window, each with its own files: the maximum number of hosts that can share a window.
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
        """The identity as stored and hashed, without backend "jax", reduction None and parts 1."""
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
    """Which samples one output folder holds: the stream's identity and the selected lines.

    Attributes:
      identity: name, bytes and crc32c of the stream file.
      machine_id, total_machines: lines with line_position % total_machines == machine_id are selected.
      max_tasks: at most this many of them; None: all.
      first_position: of the stream's first line; 0 except for dataset shards after the first.

    max_bad_records is not included: it decides whether a run stops, never what is written.
    """

    identity: dict[str, Any]
    machine_id: int
    total_machines: int
    max_tasks: int | None
    first_position: int = 0

    def to_json(self) -> dict[str, Any]:
        """The identity as stored and hashed."""
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
