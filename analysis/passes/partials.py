"""Partials in a store, created once, so that an interrupted pass goes on where it was and ends with the same bits.

    partials/<pass>-<digest of its name, version and settings>/<digest of the parts' identities>.partial

The file is 8 bytes little-endian length of a header, the header in JSON, and the pass's own bytes.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from absl import logging

from analysis.passes.protocol import Pass
from core.base.canonical_json import canonical_json, content_hash
from core.base.errors import RunError
from core.object_store import Created, LocalStore, ObjectStore
from core.object_store.shared import shared_store

FOLDER = "partials"
_PREFIX_BYTES = 8
_ELSEWHERE = "or choose another folder for partial results: --partials FOLDER, or none"
Partial = TypeVar("Partial")


@dataclass(frozen=True)
class PartialKey:
    """What decides a partial. settings: digest of the pass; parts: digest of the identities of its parts."""

    name: str
    settings: str
    parts: str

    @property
    def folder(self) -> str:
        """Of all partials of the pass."""
        return f"{FOLDER}/{self.name}-{self.settings}"

    @property
    def path(self) -> str:
        """Of the file."""
        return f"{self.folder}/{self.parts}.partial"


def partial_key(a_pass: Pass[Any, Any, Any], identities: Sequence[Any]) -> PartialKey:
    """The key of the partial of parts with these identities."""
    own = {"name": a_pass.name, "version": a_pass.version, "settings": dict(a_pass.settings)}
    return PartialKey(a_pass.name, content_hash(own), hashlib.sha256(canonical_json(list(identities))).hexdigest()[:32])


@dataclass(frozen=True)
class PartialStore:
    """Partials below `url`: a folder, `gs://` or any fsspec URL. Picklable."""

    url: str

    def read(self, a_pass: Pass[Any, Partial, Any], key: PartialKey) -> Partial | None:
        """The stored partial; None where there is none, or a damaged one, which is removed.

        Raises RunError for a file of another pass or other parts under this name.
        """
        try:
            data = self._store.read_bytes(key.path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"{self.url}/{key.path} cannot be read: {error.strerror or error}; {_ELSEWHERE}") from error
        try:
            header, payload = _parse(data)
            partial = a_pass.unpack(payload)
        except (KeyError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            logging.warning("%s/%s is damaged (%s): it is computed again", self.url, key.path, reason)
            self._store.delete(key.path)
            return None
        self._require_own(header, key)
        return partial

    def create(self, a_pass: Pass[Any, Partial, Any], key: PartialKey, partial: Partial) -> Partial:
        """Stores a partial and returns what counts from now on: another writer's, where that came first."""
        payload = a_pass.pack(partial)
        header = canonical_json(_described(key) | {"sha256": hashlib.sha256(payload).hexdigest()})
        data = len(header).to_bytes(_PREFIX_BYTES, "little") + header + payload
        try:
            created = self._store.create_bytes(key.path, data)
        except RunError as error:
            raise RunError(f"{error}; {_ELSEWHERE}") from error
        if created is not Created.ALREADY_DIFFERENT:
            return partial
        # On other hardware last bits differ; one of both results must hold for every reader.
        theirs = self.read(a_pass, key)
        return self.create(a_pass, key, partial) if theirs is None else theirs

    def remove(self, a_pass: Pass[Any, Any, Any]) -> None:
        """Removes the partials of a pass, once its result is stored."""
        folder = partial_key(a_pass, []).folder
        for name in self._store.list(f"{folder}/"):
            self._store.delete(name)
        if isinstance(self._store, LocalStore):
            self._store.remove_stale_temporaries(folder)
            _remove_empty_folders(self._store, folder)

    @property
    def _store(self) -> ObjectStore:
        return shared_store(self.url)

    def _require_own(self, header: dict[str, Any], key: PartialKey) -> None:
        wrong = [name for name, value in _described(key).items() if header.get(name) != value]
        if wrong:
            raise RunError(
                f"{self.url}/{key.path} is the partial of another pass ({', '.join(wrong)} differ): "
                "remove it, then run the same command again"
            )


def _described(key: PartialKey) -> dict[str, Any]:
    return {"pass": key.name, "settings": key.settings, "parts": key.parts}


def _parse(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and content. Raises ValueError or KeyError for bytes that `create` did not write."""
    end = _PREFIX_BYTES + int.from_bytes(data[:_PREFIX_BYTES], "little")
    header = json.loads(data[_PREFIX_BYTES:end])
    payload = data[end:]
    if not isinstance(header, dict) or hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise ValueError("its content does not match its checksum")
    return header, payload


def _remove_empty_folders(store: LocalStore, folder: str) -> None:
    for path in (store.root / folder, store.root / FOLDER, store.root):
        try:
            path.rmdir()
        except OSError:
            return
