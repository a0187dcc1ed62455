"""Where a model lies: a local folder, a .gguf file, or a hub id fetched into the local cache."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from qwen2_jax.errors import ModelError, reading

CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def locate_model(path: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """A local folder, or a `.gguf` file where that is what `path` names or all the folder holds.

    files: glob patterns of what to fetch when `path` is a hub id. Raises `ModelError` when there is no such model.
    """
    if "://" in path:
        raise ModelError(f"{path}: model folders are read from the local disk or the hub; copy it to the disk first")
    local = Path(path).expanduser()
    with reading(local):
        if local.is_file():
            if local.suffix != ".gguf":
                raise ModelError(f"{path}: a model is a folder, a hub id or a .gguf file")
            return local
        if local.is_dir():
            return _gguf_in(local)
    return _fetch(path, revision, files)


def _gguf_in(folder: Path) -> Path:
    """The folder itself when it has a config.json, else the one GGUF file in it."""
    found = sorted(folder.glob("*.gguf"))
    if (folder / "config.json").is_file() or not found:
        return folder
    if len(found) > 1:
        raise ModelError(f"{folder}: {len(found)} .gguf files, {found[0].name} first; name the one to use")
    return found[0]


def _fetch(path: str, revision: str | None, files: tuple[str, ...]) -> Path:
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"{path}: no such folder or file")
    try:
        return _download(path, branch_commit(path, revision), files)
    except Exception as error:  # the hub client raises its own, the HTTP library's and the system's errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}: no such local folder, and the model hub did not give it: {reason}") from error


@cache
def branch_commit(path: str, revision: str | None) -> str | None:
    """The commit a hub id's revision first stood for in this process: its files stay of one commit, should it move."""
    return hub_commit(_download(path, revision, CONFIG_FILES)) or revision


def _download(path: str, revision: str | None, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))


def hub_commit(folder: Path) -> str | None:
    """The commit a folder of the hub cache holds, or None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None
