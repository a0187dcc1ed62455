"""A store that is a dict: what the claims and the commit protocol are checked against at the speed of memory."""

import io
from dataclasses import dataclass, field
from pathlib import Path

from core.object_store import Created, Entry, Listing, ObjectInfo, bytes_info


@dataclass
class DictStore:
    """Satisfies `core.object_store.ObjectStore`.

    Attributes:
      replaced: names that were written by `replace_bytes`.
      loses_reply: the next creation succeeds, its reply is lost and it is tried again.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    loses_reply: bool = False
    url: str = "dict://"

    def create_bytes(self, name: str, data: bytes) -> Created:
        if name not in self.objects:
            self.objects[name] = data
            if not self.loses_reply:
                return Created.CREATED
            self.loses_reply = False
        return Created.ALREADY_SAME if self.objects[name] == data else Created.ALREADY_DIFFERENT

    def create_file(self, name: str, local_path: Path, info: ObjectInfo) -> Created:
        data = local_path.read_bytes()
        assert bytes_info(data) == info
        return self.create_bytes(name, data)

    def replace_bytes(self, name: str, data: bytes) -> None:
        self.replaced.add(name)
        self.objects[name] = data

    def read_bytes(self, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise FileNotFoundError(name) from None

    def open(self, name: str) -> io.BytesIO:
        return io.BytesIO(self.read_bytes(name))

    def info(self, name: str) -> ObjectInfo | None:
        return bytes_info(self.objects[name]) if name in self.objects else None

    def list(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))

    def listing(self, prefix: str = "") -> Listing:
        found = {name: self.objects[name] for name in self.list(prefix)}
        return Listing(tuple(Entry(name, len(data), 0.0, data.hex()) for name, data in found.items()), 0.0)

    def delete(self, name: str) -> None:
        self.objects.pop(name, None)

    def free_bytes(self) -> None:
        return None
