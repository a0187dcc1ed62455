"""`metadata.json`: what decides the bytes of a folder of mean vectors, and what is in it once a run has finished."""

import json
from dataclasses import dataclass
from typing import Any

from analysis.mean_vectors.stored.names import METADATA
from core.base.canonical_json import canonical_json
from core.base.errors import UsageError
from core.base.json_types import NONE, require_all, require_types
from core.commit.identity import differing_fields
from core.object_store import Created, ObjectStore

_KINDS: dict[str, tuple[type, ...]] = {
    "identity": (dict,),
    "model_path": (str,),
    "revision": (str, NONE),
    "results": (dict, NONE),
}
_IDENTITY: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "layers": (list,),
    "batch_size": (int,),
    "model": (dict,),
    "compute_dtype": (str,),
    "backend": (str,),
    "max_seq_length": (int,),
    "overlong": (str,),
    "seed": (int, NONE),
}


@dataclass(frozen=True)
class MeanMetadata:
    """The content of the file.

    Attributes:
      identity: what decides the vectors: mode, pools, layers, batch size, digests of model and tokenizer, dtypes,
        lengths, seed. A run with another identity is refused.
      model_path: where the model was, with its revision: where `compare` looks for it.
      results: counts, failed texts and means; None until a run has finished.
    """

    identity: dict[str, Any]
    model_path: str
    revision: str | None
    results: dict[str, Any] | None = None

    def encode(self) -> bytes:
        """The bytes of the file."""
        return canonical_json(
            {
                "identity": self.identity,
                "model_path": self.model_path,
                "revision": self.revision,
                "results": self.results,
            }
        )


def read_metadata(store: ObjectStore) -> MeanMetadata | None:
    """The metadata of a folder; None where there is none. Raises UsageError where another program wrote it."""
    try:
        value = json.loads(store.read_bytes(METADATA))
        require_types(value, _KINDS)
        require_types(value["identity"], _IDENTITY, "identity.")
        require_types(value["identity"]["model"], {"digest": (str,)}, "identity.model.")
        require_all(value["identity"]["layers"], int, "identity.layers")
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        reason = f"not written by `mean` ({error})"
        raise UsageError(f"{store.url}/{METADATA}: {reason}: use another folder") from error
    return MeanMetadata(**{name: value[name] for name in _KINDS})


def check_same(store: ObjectStore, stored: MeanMetadata, wanted: dict[str, Any]) -> None:
    """Raises UsageError naming the fields in which the stored identity is not `wanted`."""
    differences = differing_fields(stored.identity, wanted)
    if differences:
        raise UsageError(
            f"{store.url}/{METADATA} belongs to another run ({'; '.join(differences)}): "
            "use the same flags, another --output, or --overwrite"
        )


def declare(store: ObjectStore, metadata: MeanMetadata) -> None:
    """Writes the identity before the first vector, create-only. Raises UsageError where another run was first."""
    if store.create_bytes(METADATA, metadata.encode()) is Created.ALREADY_DIFFERENT:
        stored = read_metadata(store)
        if stored is not None:
            check_same(store, stored, metadata.identity)
