"""Whitened chunks as one dataset of Hugging Face datasets, mapped to memory.

Axis letters: N texts, T tokens of a row, padding included, K width of a whitened token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.exporting.targets.saved_dataset import dataset_files, stream_name, write_stream
from analysis.text_whitening.chunk_files import ChunkFile, ChunkRecord, read_chunk
from analysis.text_whitening.summary import METADATA_FILE, WHITENING_FILE
from analysis.whitening.stored_whitening import load_whitening
from core.base.errors import RunError, UsageError
from core.object_store import LocalStore, file_info, open_store
from core.object_store.local import disk_errors
from core.object_store.single_file import read_json_object
from core.shards.formats.arrow_columns import ArrayColumn, nested_lists, table_schema

if TYPE_CHECKING:
    from datasets import Dataset

DATASET_FOLDER = "dataset"
ACTIVATIONS = "whitened_activations"
_CARD = """
# Whitened activations of {model}, {site} of layer {layer}

{n_samples} texts of {seq_len} tokens, {kept} values each, {dtype}: `whitened_activations` (T, K), `attention_mask` (1
for a token that counts: not padding, and none of: {exclude}), `token_ids`, `sample_ids`.
`whitening.safetensors` has `mean`, `transform` and `inverse`: x = z @ inverse + mean. `metadata.json` has all settings.

    from datasets import load_dataset

    dataset = load_dataset("{repo}", split="train", streaming=True)
"""


class DatasetCreator:
    """Makes the dataset of an output folder: `DatasetCreator(output_dir).create()`."""

    def __init__(self, output_dir: str) -> None:
        """output_dir: a local folder that `process_and_store_whitened` has finished."""
        self._store = open_store(str(output_dir))
        if not isinstance(self._store, LocalStore):
            raise UsageError(f"{output_dir}: a dataset is mapped to memory from a local folder: copy the folder first")

    def create(self) -> WhitenedDataset:
        """Writes the chunks as `dataset/`, as `datasets.save_to_disk` would, and opens it.

        One chunk is in memory at a time. Files that are there already are kept if their size is right.
        Raises RunError for an unfinished folder or a damaged chunk.
        """
        try:
            metadata = read_json_object(self._store, METADATA_FILE)
        except FileNotFoundError as error:
            raise RunError(f"{self._store.url}: it is not finished: call process_and_store_whitened first") from error
        records = [_record_of(entry) for entry in metadata["chunks"]]
        n_samples, seq_len, kept = metadata["shape"]
        schema = _schema(metadata["processing_config"]["dtype"], seq_len, kept)
        folder = Path(self._store.url) / DATASET_FOLDER
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            files = [self._write(folder, schema, record, len(records)) for record in records]
            for name, data in dataset_files(schema, files).items():
                (folder / name).write_bytes(data)
        found = WhitenedDataset.open(self._store.url)
        if len(found) != n_samples:
            raise RunError(f"{folder}: it has {len(found)} rows, its chunks {n_samples}: delete the folder")
        return found

    def _write(self, folder: Path, schema: Any, record: ChunkRecord, n_files: int) -> dict[str, Any]:
        path = folder / stream_name(record.number, n_files)
        unfinished = path.with_suffix(".unfinished")
        if not path.exists():
            chunk = read_chunk(self._store, record)
            chunk.check()
            with open(unfinished, "wb") as file:
                write_stream(file, schema, iter([_batch(schema, chunk)]))
            unfinished.rename(path)
        info = file_info(path)
        return {"name": path.name, "bytes": info.size, "crc32c": info.crc32c}


def _record_of(entry: Mapping[str, Any]) -> ChunkRecord:
    return ChunkRecord(**{name: entry[name] for name in ChunkRecord.__dataclass_fields__})


def _schema(dtype: str, seq_len: int, kept: int) -> Any:
    lists = f"[int32]*{seq_len}"
    more = {"sample_ids": "int64", "token_ids": lists, "attention_mask": lists}
    return table_schema([ArrayColumn(ACTIVATIONS, dtype, kept, seq_len)], more)


def _batch(schema: Any, chunk: ChunkFile) -> Any:
    import pyarrow

    n, seq_len, kept = chunk.activations.shape

    def lists(values: np.ndarray) -> Any:
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.astype(np.int32).reshape(-1)), seq_len)

    columns = {
        "sample_ids": pyarrow.array(chunk.sample_ids.astype(np.int64)),
        "token_ids": lists(chunk.token_ids),
        "attention_mask": lists(chunk.attention_mask),
        ACTIVATIONS: nested_lists(chunk.activations.reshape(-1, kept), np.full(n, seq_len)),
    }
    return pyarrow.record_batch([columns[name] for name in schema.names], schema=schema)


@dataclass(frozen=True)
class WhitenedArray:
    """The activations as an array (N, T, K) that is read where it is indexed."""

    dataset: Dataset
    shape: tuple[int, int, int]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """A text (T, K), or those of a slice or of a list of places (n, T, K)."""
        found = self.dataset.with_format("numpy", columns=[ACTIVATIONS], dtype=self.dtype)[index]
        values: np.ndarray = np.asarray(found[ACTIVATIONS], self.dtype)
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)


class WhitenedDataset:
    """`whitened_activations`, an array (N, T, K), and `metadata`: whitening_params, masks, sample ids, configuration.

    Attributes:
      dataset: the `datasets.Dataset` with a row for each text, memory-mapped: for training, streaming
        (`dataset.to_iterable_dataset()`), shuffling.
    """

    def __init__(self, output_dir: str, dataset: Dataset) -> None:
        self.dataset, self._output_dir = dataset, output_dir
        self._metadata = read_json_object(open_store(output_dir), METADATA_FILE)

    @classmethod
    def open(cls, output_dir: str) -> WhitenedDataset:
        """Of a folder in which `DatasetCreator` has made one. Raises UsageError without the package datasets."""
        try:
            import datasets
        except ImportError as error:
            raise UsageError("datasets is not installed: pip install -e '.[datasets]'") from error
        return cls(output_dir, datasets.load_from_disk(f"{output_dir}/{DATASET_FOLDER}"))

    def __getitem__(self, key: str) -> Any:
        """One of the two keys, as the described structure nests them."""
        if key == ACTIVATIONS:
            shape = tuple(self._metadata["shape"])
            return WhitenedArray(self.dataset, shape, np.dtype(self._metadata["processing_config"]["dtype"]))
        if key != "metadata":
            raise KeyError(key)
        whitening = load_whitening(f"{self._output_dir}/{WHITENING_FILE}")
        return {
            "whitening_params": {"mean": whitening.mean, "transform_matrix": whitening.transform},
            "attention_mask": self._column("attention_mask").astype(np.uint8),
            "sample_ids": self._column("sample_ids").tolist(),
            "processing_config": dict(self._metadata["processing_config"]),
        }

    def keys(self) -> tuple[str, str]:
        """The two keys."""
        return ACTIVATIONS, "metadata"

    def __len__(self) -> int:
        """N."""
        return len(self.dataset)

    def _column(self, name: str) -> np.ndarray:
        values: np.ndarray = self.dataset.with_format("numpy", columns=[name])[:][name]
        return values

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """Uploads the rows (`datasets.Dataset.push_to_hub`, which takes `options`), the whitening, and a card.

        Returns what the upload of the rows returns.
        """
        from huggingface_hub import DatasetCard, HfApi

        pushed = self.dataset.push_to_hub(repo_id, **options)
        api = HfApi(token=options.get("token"))
        store = open_store(self._output_dir)
        for name in (WHITENING_FILE, METADATA_FILE):
            data = store.read_bytes(name)
            api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id=repo_id, repo_type="dataset")
        # datasets has put the features into the header of its card, which stays.
        card = DatasetCard.load(repo_id, token=options.get("token"), ignore_metadata_errors=True)
        card.text = self._card(repo_id)
        card.push_to_hub(repo_id, token=options.get("token"))
        return pushed

    def _card(self, repo_id: str) -> str:
        settings, (n_samples, _, kept) = self._metadata["processing_config"], self._metadata["shape"]
        exclude = ", ".join(settings["exclude"]) or "nothing"
        return _CARD.format(repo=repo_id, n_samples=n_samples, kept=kept, **settings | {"exclude": exclude})
