"""The code as one archive: only the files of this checkout that an extraction needs.

`python3 -m fleet.bundle` writes it to stdout, as the context of `docker build`.
"""

import configparser
import gzip
import hashlib
import io
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

# What setup.cfg installs, and these. Other files of a checkout (keys, data, notes) are not packed.
_FILES = ("LICENSE", "README.md", "constraints.txt", "launchers/Dockerfile", "pyproject.toml", "setup.cfg")
_FOLDERS = ("scripts",)
_SUFFIXES = {".py", ".sh"}


@dataclass(frozen=True)
class Bundle:
    """A tar.gz and the first digits of its SHA-256; the same code gives the same bytes."""

    content: bytes
    digest: str


def build_bundle(root: Path) -> Bundle:
    """Packs the checkout at `root`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in code_files(root):
            entry = tarfile.TarInfo(str(path.relative_to(root)))
            entry.size = path.stat().st_size
            entry.mode = 0o755 if path.suffix == ".sh" else 0o644
            with path.open("rb") as stream:
                archive.addfile(entry, stream)
    content = gzip.compress(packed.getvalue(), mtime=0)
    return Bundle(content, hashlib.sha256(content).hexdigest()[:12])


def code_files(root: Path) -> list[Path]:
    """The files of the checkout at `root` that belong to the code, in order."""
    config = configparser.ConfigParser()
    config.read(root / "setup.cfg")
    modules = [root / f"{module}.py" for module in config["options"]["py_modules"].split()]
    packages = [pattern.rstrip("*") for pattern in config["options.packages.find"]["include"].split()]
    inside = [path for folder in (*_FOLDERS, *packages) for path in (root / folder).rglob("*")]
    kept = [path for path in inside if path.suffix in _SUFFIXES and path.is_file()]
    return sorted([*(root / name for name in _FILES), *modules, *kept])


if __name__ == "__main__":
    sys.stdout.buffer.write(build_bundle(Path(__file__).resolve().parents[1]).content)
