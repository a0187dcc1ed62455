"""Where a model lies: a local folder, a GGUF file, a hub id fetched into the local cache, or a URL such as gs://."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from core.base.errors import ModelError, reading
from qwen2_jax.checkpoints.files import ByteFile, LocalFile, RemoteFile, cache_folder, is_remote, matching, remote_files

CONFIG_FILES = ("config.json",)
WEIGHT_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
BIN_FILES = ("config.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "*.model")
# The first of these that is there holds the weights, or names the files that do.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def locate_model(path: str, revision: str | None, files: tuple[str, ...]) -> Path:
    """A local folder, or a `.gguf` file where that is what `path` names or all the folder holds.

    files: glob patterns of what to fetch into a local cache when `path` is a hub id or a URL; an object that changes is
    fetched again. Raises `ModelError` when there is no such model.
    """
    if is_remote(path):
        return _fetch_remote(path, files)
    local = Path(path).expanduser()
    with reading(local):
        if local.is_file():
            if local.suffix != ".gguf":
                raise ModelError(f"{path}: a model is a folder, a hub id or a .gguf file")
            return local
        if local.is_dir():
            return _gguf_in(local)
    return _fetch(path, revision, files)


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model.

    place: what messages call the model's folder. folder: on the local disk, with config.json in it; None for a GGUF
    file, which needs none. weights: in name order. commit: the one a hub id stands for.
    """

    place: str
    folder: Path | None
    weights: tuple[ByteFile, ...]
    commit: str | None = None


def find_model(path: str, revision: str | None) -> ModelFiles:
    """The model's config, and its weights where they are. Raises `ModelError` for what is not there."""
    gguf = find_gguf(path)
    if gguf is not None:
        return ModelFiles(gguf.url, None, (gguf,))
    if is_remote(path):
        remote = remote_files(path)
        names = _weight_names(path, {name: file.read_bytes for name, file in remote.items()})
        return ModelFiles(path, locate_model(path, revision, CONFIG_FILES), tuple(remote[name] for name in names))
    folder = locate_model(path, revision, WEIGHT_FILES)
    from_hub = not Path(path).expanduser().is_dir()
    if from_hub and not any((folder / name).is_file() for name in _WEIGHTS):
        folder = locate_model(path, revision, BIN_FILES)
    with reading(folder):
        names = _weight_names(str(folder), {file.name: file.read_bytes for file in folder.iterdir() if file.is_file()})
    weights = tuple(LocalFile.of(folder / name) for name in names)
    return ModelFiles(str(folder), folder, weights, hub_commit(folder))


def find_gguf(path: str) -> ByteFile | None:
    """The GGUF file that a local path or a URL names, or which is all its folder holds; None for any other model."""
    if is_remote(path):
        files = remote_files(path)
        name = _only_gguf(path, list(files))
        return None if name is None else files[name]
    local = Path(path).expanduser()
    with reading(local):
        found = _gguf_in(local) if local.is_dir() else local
        return LocalFile.of(found) if found.suffix == ".gguf" and found.is_file() else None


def _weight_names(place: str, files: Mapping[str, Callable[[], bytes]]) -> list[str]:
    """The names of the weight files. files: everything in the folder, and what gives its content."""
    first = next((name for name in _WEIGHTS if name in files), None)
    if first is None:
        raise ModelError(f"{place}: no model.safetensors(.index.json) and no pytorch_model.bin(.index.json) there")
    if not first.endswith(".index.json"):
        return [first]
    with reading(f"{place}/{first}"):
        content = files[first]()
    try:
        names = sorted({str(name) for name in json.loads(content.decode())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{place}/{first}: no weight_map could be read from it; download it again") from error
    if missing := [name for name in names if name not in files]:
        raise ModelError(f"{place}/{missing[0]}: missing, though {first} names it; download it again")
    return names


def _gguf_in(folder: Path) -> Path:
    """The folder itself when it has a config.json, else the one GGUF file in it."""
    name = _only_gguf(str(folder), [file.name for file in folder.iterdir()])
    return folder if name is None else folder / name


def _only_gguf(place: str, names: list[str]) -> str | None:
    found = sorted(name for name in names if name.endswith(".gguf"))
    if "config.json" in names or not found:
        return None
    if len(found) > 1:
        raise ModelError(f"{place}: {len(found)} .gguf files, {found[0]} first; name the one to use")
    return found[0]


def _fetch_remote(url: str, patterns: tuple[str, ...]) -> Path:
    files = remote_files(url)
    gguf = _only_gguf(url, list(files))
    if gguf is not None:
        return _fetched(url, [files[gguf]]) / gguf
    return _fetched(url, [files[name] for name in matching(list(files), patterns)])


def _fetched(url: str, files: Sequence[RemoteFile]) -> Path:
    """A local folder with copies of the files, kept under what identifies their content."""
    versions = sorted((file.name, file.version) for file in files)
    key = hashlib.sha256(json.dumps([url.rstrip("/"), versions]).encode()).hexdigest()[:32]
    folder = cache_folder("models") / key
    if folder.is_dir():
        return folder
    with reading(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".fetching-", dir=folder.parent))
        try:
            for file in files:
                file.copy_to(draft / file.name)
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def _fetch(path: str, revision: str | None, files: tuple[str, ...]) -> Path:
    if not _HUB_ID.fullmatch(path):
        raise ModelError(f"{path}: no such folder or file")
    try:
        return _download(path, branch_commit(path, revision), files)
    except Exception as error:  # the hub client raises its own, the HTTP library's and the system's errors
        raise ModelError(f"{path}: no such local folder, {_hub_failure(error)}") from error


def _hub_failure(error: Exception) -> str:
    """Why the hub's client gave no files, to end a sentence."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    if not isinstance(error, LocalEntryNotFoundError):
        return f"and the model hub did not give it: {_first_line(error)}"
    if error.__cause__ is None or isinstance(error.__cause__, OfflineModeIsEnabled):
        return "not in the hub's cache, and HF_HUB_OFFLINE forbids downloads"
    return f"not in the hub's cache, and the request to the model hub failed: {_first_line(error.__cause__)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
