"""Mean activation vectors on GPUs of Modal: `analyze_activations.py mean`, a batch of texts for each call.

    modal volume put activation-vectors-cache training_data.pkl
    modal run -m launchers.modal_mean --num-samples 5000 --batch-size 200 --mode both
    modal volume get activation-vectors-cache / vectors

The volume holds the data and the folder that docs/mean_vectors.md describes. The same command goes on where an earlier
one stopped. On a volume the last writer of a file wins, so a batch is written in a container's own folder, create-only,
and copied from there; a batch has the same bytes whoever computes it.
"""

import os
import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modal

if TYPE_CHECKING:
    from analysis.mean_vectors.extraction import VectorExtractor
    from analysis.mean_vectors.job import MeanJob

CODE = Path("/code")
STORED = Path("/vectors")
SCRATCH = Path("/tmp/vectors")
MODEL = "EleutherAI/pythia-12b"
LAYERS = (25, 26, 27)


def build_image() -> modal.Image:
    """CUDA wheels of JAX and this checkout."""
    from fleet.bundle import code_files  # Modal imports this file in the container too, where there is no `fleet`

    root = Path(__file__).resolve().parents[1]
    code = {path.relative_to(root) for path in code_files(root)}
    image = modal.Image.debian_slim(python_version="3.12")
    image = image.add_local_dir(root, str(CODE), copy=True, ignore=lambda path: path not in code)
    return image.run_commands(f"pip install --constraint {CODE}/constraints.txt --editable '{CODE}[cuda]'")


app = modal.App("activation-vectors", image=build_image() if modal.is_local() else None)
volume = modal.Volume.from_name("activation-vectors-cache", create_if_missing=True)
models = modal.Volume.from_name("activations-models", create_if_missing=True)
_VOLUMES: dict[Any, Any] = {str(STORED): volume, "/root/.cache/huggingface": models}


@app.function(gpu="A100-80GB", memory=65536, timeout=30 * 60, volumes=_VOLUMES, enable_memory_snapshot=True)
def extract_single_vector(text: str, mode: str = "short") -> dict[str, Any]:
    """The vector of one text, 5120 values or 20480 with mode "long", or why it has none."""
    found = _extractor(mode)([text])
    if found.failed:
        return {"vector": None, "failed": found.failed[0]}
    return {"vector": found.vectors[mode][0].tolist(), "failed": None}


@app.function(gpu="A100-80GB", memory=65536, timeout=30 * 60, volumes=_VOLUMES, enable_memory_snapshot=True)
def extract_batch(number: int, settings: dict[str, Any]) -> int:
    """Stores a batch of vectors in the volume, unless it is there; returns how many texts of it have failed."""
    from analysis.mean_vectors.filling import fill

    job = _job(tuple(sorted(settings.items())))
    _copy(STORED, SCRATCH, f"vectors_*/batch_{number:03d}.pkl")
    (batch,) = fill(job, [number])
    if batch.is_new:
        _copy(SCRATCH, STORED, f"vectors_*/batch_{number:03d}.pkl")
        volume.commit()
    return len(batch.failed)


@app.function(memory=16384, timeout=30 * 60, volumes=_VOLUMES)
def begin(settings: dict[str, Any], overwrite: bool) -> int:
    """Writes the metadata, or refuses another run's; returns the number of batches. overwrite: deletes first."""
    from analysis.mean_vectors.job import clear, prepare
    from analysis.mean_vectors.texts import chosen_texts
    from core.object_store import open_store

    if overwrite:
        clear(open_store(str(STORED)))
    _copy(STORED, SCRATCH, "metadata.json")
    job = prepare(_options(settings))
    _copy(SCRATCH, STORED, "metadata.json")
    volume.commit()
    return -(-sum(1 for _ in chosen_texts(job.options)) // job.options.batch_size)


@app.function(memory=16384, timeout=30 * 60, volumes=_VOLUMES)
def compute_mean_from_batches(mode: str) -> dict[str, Any]:
    """Writes the mean of a mode from its stored batches; returns norm, count and width.

    For the mode of the whole run, such as "both", also the metadata.
    """
    from analysis.mean_vectors.computing import finish, merge_mean
    from analysis.mean_vectors.stored.metadata import read_metadata
    from core.object_store import open_store

    volume.reload()
    shutil.rmtree(SCRATCH, ignore_errors=True)
    _copy(STORED, SCRATCH, "metadata.json", "vectors_*/batch_*.pkl")
    store = open_store(str(SCRATCH))
    metadata = read_metadata(store)
    if metadata is None:
        raise RuntimeError("the volume holds no metadata.json: nothing was extracted")
    if mode == metadata.identity["mode"]:
        found = finish(store, metadata)["means"]
    else:
        mean = merge_mean(store, metadata, mode)
        found = {mode: {"norm": mean.norm, "count": mean.count, "width": len(mean.mean)}}
    _copy(SCRATCH, STORED, "mean_vector_*.pkl", "metadata.json")
    volume.commit()
    return found


@app.local_entrypoint()
def main(
    num_samples: int = 5000,
    batch_size: int = 200,
    mode: str = "short",
    overwrite: bool = False,
    model_path: str = MODEL,
    layers: str = " ".join(map(str, LAYERS)),
    data: str = "training_data.pkl",
) -> None:
    """Extracts the batches on as many GPUs as Modal gives, then the means."""
    settings: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size, "mode": mode}
    settings |= {"model_path": model_path, "layers": layers, "data": str(STORED / data)}
    n_batches = begin.remote(settings, overwrite)
    failed = 0
    for done, count in enumerate(extract_batch.map(range(n_batches), kwargs={"settings": settings}), 1):
        failed += count
        print(f"{done} of {n_batches} batches, {failed} failed texts", flush=True)
    for name, facts in compute_mean_from_batches.remote(mode).items():
        print(f"mean_vector_{name}: {facts['count']} vectors of {facts['width']} values, norm {facts['norm']:.6g}")


def _options(settings: dict[str, Any]) -> Any:
    from analysis.mean_vectors.options import MeanOptions
    from core.base.arguments import checked_arguments

    layers = [int(layer) for layer in settings["layers"].split()]
    return MeanOptions(**checked_arguments(MeanOptions, settings | {"layers": layers, "output": str(SCRATCH)}))


@lru_cache(1)
def _job(settings: tuple[tuple[str, Any], ...]) -> "MeanJob":
    """Of this container: its model is loaded once."""
    from analysis.mean_vectors.job import prepare

    volume.reload()
    _copy(STORED, SCRATCH, "metadata.json")
    return prepare(_options(dict(settings)))


@lru_cache(2)
def _extractor(mode: str) -> "VectorExtractor":
    from analysis.mean_vectors.extraction import load_extractor

    return load_extractor(MODEL, modes=(mode,), layers=LAYERS, max_seq_length=2048, overlong="truncate")


def _copy(source: Path, target: Path, *patterns: str) -> None:
    """Copies files from one folder to another; each appears there whole."""
    for path in (path for pattern in patterns for path in sorted(source.glob(pattern))):
        copied = target / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        temporary = copied.with_name(f".{copied.name}")
        shutil.copyfile(path, temporary)
        os.replace(temporary, copied)
