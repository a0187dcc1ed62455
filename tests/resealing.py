"""Records that agree with files that were changed, as a bug in the writer would leave them."""

from pathlib import Path

from core.base.canonical_json import read_sealed_json, sealed_json
from core.object_store.sinks import digest_stream


def write_and_reseal(path: Path, data: bytes, folder: Path) -> None:
    """Writes other content of a file of one of `folder`'s windows, and makes the record agree with it."""
    path.write_bytes(data)
    window = path.name.partition(".")[0].rpartition("_")[2]
    record_path = folder / f"shard_{window}.json"
    fields = read_sealed_json(record_path.read_bytes())
    with path.open("rb") as stream:
        digest = digest_stream(stream)
    for file in fields["files"]:
        if folder / file["name"] == path:
            file |= {"bytes": digest.bytes, "crc32c": digest.crc32c, "sha256": digest.sha256}
    record_path.write_bytes(sealed_json(fields))
