"""A batch of vectors as a file: `vectors_short/batch_000.pkl`, a pickle of one dict of plain data and one array.

Axis letters: S samples, W width of a vector.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from analysis.mean_vectors.stored.names import batch_name, batch_number
from analysis.mean_vectors.stored.plain_pickle import load_plain
from core.base.errors import RunError
from core.base.json_types import require_all, require_types
from core.object_store import ObjectStore

# Protocol 5 pickles of numpy 2 name a module that numpy 1.26 does not have; 4 is read by both.
_PROTOCOL = 4
_KINDS: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "batch": (int,),
    "vectors": (np.ndarray,),
    "sample_idx": (list,),
    "text_sha256": (list,),
    "failed": (list,),
    "truncated": (list,),
}
_FAILED: dict[str, tuple[type, ...]] = {"sample_idx": (int,), "text_sha256": (str,), "reason": (str,)}


class TextId(NamedTuple):
    """A text by its place in the source and the sha256 of its UTF-8 bytes."""

    sample_idx: int
    sha256: str


class FailedText(NamedTuple):
    """A text without a vector, and why."""

    text: TextId
    reason: str

    def to_json(self) -> dict[str, Any]:
        """As it is stored."""
        return {"sample_idx": self.text.sample_idx, "text_sha256": self.text.sha256, "reason": self.reason}


@dataclass(frozen=True)
class VectorBatch:
    """The vectors of consecutive texts of a run.

    Attributes:
      texts: of the vectors, in their order. failed: those of the batch that have none.
      truncated: `sample_idx` of the texts of which only the first tokens were read.
    """

    mode: str
    number: int
    texts: tuple[TextId, ...]
    vectors: Float32[np.ndarray, "S W"]
    failed: tuple[FailedText, ...] = ()
    truncated: tuple[int, ...] = ()

    @property
    def n_texts(self) -> int:
        """Those that failed included."""
        return len(self.texts) + len(self.failed)

    def is_of(self, texts: Sequence[TextId]) -> bool:
        """Whether these are the texts of the batch, in order."""
        failed = {one.text for one in self.failed}
        is_whole = self.n_texts == len(texts) and failed <= set(texts)
        return is_whole and self.texts == tuple(text for text in texts if text not in failed)


def dump_plain(value: dict[str, Any]) -> bytes:
    """A pickle whose bytes depend on the value alone, for `pickle.load` and numpy."""
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=_PROTOCOL)
    # With the memo the bytes would depend on which texts are the same object.
    pickler.fast = True
    pickler.dump(value)
    return stream.getvalue()


def encode_batch(batch: VectorBatch) -> bytes:
    """The bytes of the file: equal batches have equal bytes."""
    return dump_plain(
        {
            "mode": batch.mode,
            "batch": batch.number,
            "vectors": np.ascontiguousarray(batch.vectors),
            "sample_idx": [text.sample_idx for text in batch.texts],
            "text_sha256": [text.sha256 for text in batch.texts],
            "failed": [one.to_json() for one in batch.failed],
            "truncated": list(batch.truncated),
        }
    )


def decode_batch(data: bytes) -> VectorBatch:
    """The batch in the bytes of a file. Raises ValueError saying what is wrong with them."""
    value = load_plain(data)
    require_types(value, _KINDS)
    require_all(value["sample_idx"], int, "sample_idx")
    require_all(value["text_sha256"], str, "text_sha256")
    require_all(value["truncated"], int, "truncated")
    for one in value["failed"]:
        require_types(one, _FAILED, "failed: ")
    vectors = value["vectors"]
    if vectors.dtype != np.float32 or vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise ValueError("its vectors are not finite rows of float32")
    if not len(vectors) == len(value["sample_idx"]) == len(value["text_sha256"]):
        raise ValueError("it has not one text for each vector")
    texts = tuple(map(TextId, value["sample_idx"], value["text_sha256"]))
    failed = (FailedText(TextId(one["sample_idx"], one["text_sha256"]), one["reason"]) for one in value["failed"])
    return VectorBatch(value["mode"], value["batch"], texts, vectors, tuple(failed), tuple(value["truncated"]))


def read_batch(store: ObjectStore, mode: str, number: int) -> VectorBatch | None:
    """A stored batch; None where there is none. Raises RunError for a damaged one."""
    name = batch_name(mode, number)
    try:
        batch = decode_batch(store.read_bytes(name))
        if (batch.mode, batch.number) != (mode, number):
            raise ValueError(f"it is batch {batch.number} of {batch.mode}")
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunError(f"{store.url}/{name}: damaged ({error}): delete it and run the same command again") from error
    return batch


def stored_numbers(store: ObjectStore, mode: str) -> list[int]:
    """The numbers of the stored batches of a mode, ascending."""
    found = (batch_number(name, mode) for name in store.list(f"vectors_{mode}/"))
    return sorted(number for number in found if number is not None)
