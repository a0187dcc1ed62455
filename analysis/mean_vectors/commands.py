"""`analyze_activations.py mean …` as functions with plain arguments, for notebooks."""

from typing import TYPE_CHECKING, Any

from analysis.mean_vectors.options import MeanOptions
from analysis.mean_vectors.stored.names import ARRAYS
from core.base.arguments import checked_arguments, path_text, with_fields_of
from core.base.errors import UsageError

if TYPE_CHECKING:
    from analysis.mean_vectors.comparing import MeanComparison
    from analysis.mean_vectors.computing import MeanSummary

FORMATS = ("safetensors", "npy", "pt")


@with_fields_of(MeanOptions)
def mean(data: Any, model_path: str, output: str, *, quiet: bool = True, **options: Any) -> "MeanSummary":
    """The pooled vectors of texts and their mean, stored in `output`; goes on where an earlier call stopped.

    data: one or several sources: a pickled list of texts, JSON Lines, text, Parquet, a saved dataset. Raises UsageError
    naming an argument, RunError for data or storage, ModelError.
    """
    from analysis.mean_vectors.computing import compute

    given = {"data": data, "model_path": model_path, "output": output} | options
    return compute(MeanOptions(**checked_arguments(MeanOptions, given)), quiet=quiet)


def mean_compare(
    folder: str,
    *,
    texts: Any = None,
    vectors: str | None = None,
    other: str | None = None,
    mode: str | None = None,
    **options: Any,
) -> "MeanComparison":
    """Cosines with the mean of `folder`: of `texts`, of the stored `vectors` of a folder, or of an `other` mean.

    options: those of `mean` that say which texts are read, and `model_path` where the model has moved. Raises
    UsageError unless exactly one thing is named, or where it does not fit the mean.
    """
    from analysis.mean_vectors import comparing

    folder = path_text(folder, "folder")
    if sum(given is not None for given in (texts, vectors, other)) != 1:
        raise UsageError("compare: name one of --texts, --vectors and --other")
    if vectors is not None:
        return comparing.compare_vectors(folder, path_text(vectors, "vectors"), mode)
    if other is not None:
        return comparing.compare_means(folder, path_text(other, "other"), mode)
    given = {"data": texts, "model_path": "", "output": folder} | options
    return comparing.compare_texts(folder, MeanOptions(**checked_arguments(MeanOptions, given)), mode)


def mean_export(folder: str, to: str, output: str, *, mode: str | None = None, array: str = "mean") -> tuple[str, ...]:
    """Writes the means of `folder` to one file, as safetensors, npy or pt; returns the names of the arrays in it.

    array: mean, normalized or standard_error, for npy. Raises UsageError for what the folder does not have.
    """
    from analysis.mean_vectors.exporting import export_means

    if to not in FORMATS:
        raise UsageError(f"--to {to}: must be one of {', '.join(FORMATS)}")
    if array not in ARRAYS:
        raise UsageError(f"--array {array}: must be one of {', '.join(ARRAYS)}")
    return export_means(path_text(folder, "folder"), to, path_text(output, "output"), mode, array)
