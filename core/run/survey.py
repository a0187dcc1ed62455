"""Estimates a stream's size from a few of its records, and whether its output fits on the disk."""

import errno
from dataclasses import dataclass

from core.base.errors import RunError
from core.dataset_utils import survey_records
from core.run.config import RunConfig
from core.run.extraction import WINDOWS_IN_MEMORY
from core.run.job import Job
from core.run.progress import format_bytes
from core.samples.windows import TokenizedSample
from core.shards.formats import FORMATS

_SURVEYED_RECORDS = 32
# What gzip leaves of activations, measured on pickle shards of real models; assumed until a step has been computed.
_GZIP_RATIO = {"float16": 0.93, "bfloat16": 0.79, "float32": 0.93, "int8": 0.9, "float8_e4m3fn": 0.85}
# A token in the sample table: its id and its share of preview and labels, compressed.
TABLE_BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Survey:
    """An estimate of a stream, from a few evenly spread records: tokens that the model sees, and stored rows.

    rows: of the stored arrays; each is a token or a pool of a sample.
    """

    samples: int
    tokens: int
    rows: int


def survey_stream(job: Job) -> Survey:
    """Counts the records and tokenizes a few of them, or all of a small stream."""
    config = job.config
    share = (config.machine_id, config.total_machines, job.stream.max_tasks)
    n_records, records = survey_records(job.stream_path, *share, wanted=_SURVEYED_RECORDS)
    samples = [item for item in map(job.select, job.tokenizer.samples(records)) if isinstance(item, TokenizedSample)]
    scale = n_records / max(len(records), 1)
    return Survey(
        round(len(samples) * scale),
        round(sum(len(sample.token_ids) for sample in samples) * scale),
        round(sum(sample.n_rows for sample in samples) * scale),
    )


def stored_bytes(job: Job, tokens: int, rows: int, ratio: float | None = None) -> int:
    """Bytes on disk when the model sees `tokens` tokens and stored arrays have `rows` rows.

    ratio: stored over raw bytes, where it was measured.
    """
    config = job.config
    if ratio is None:
        ratio = typical_ratio(config, job.stored_dtype)
    return int(rows * sum(job.bytes_per_row.values()) * ratio + tokens * TABLE_BYTES_PER_TOKEN)


def typical_ratio(config: RunConfig, dtype: str) -> float:
    """Stored over raw bytes of values in `dtype`: what the format leaves of them, and gzip of that."""
    ratio = FORMATS[config.format].expected_ratio[dtype]
    return ratio * _GZIP_RATIO[dtype] if config.gzipped else ratio


def disk_needed(job: Job, tokens: int, rows: int, ratio: float | None = None) -> int:
    """Local bytes that a run needs: all output, or a few windows when local files are deleted after upload."""
    needed = stored_bytes(job, tokens, rows, ratio)
    if job.keeps_local_copy:
        return needed
    sizes = job.bytes_per_row.values()
    return min(needed, int(2 * WINDOWS_IN_MEMORY * job.config.shard_bytes * sum(sizes) / max(sizes)))


def check_disk_space(job: Job, survey: Survey, already_stored: int, free: int | None) -> None:
    """Raises RunError when the run cannot fit on the disk."""
    needed = disk_needed(job, survey.tokens, survey.rows) - already_stored
    if free is not None and needed > free:
        raise RunError(
            f"the run needs about {format_bytes(needed)} below {job.config.output_dir}, where {format_bytes(free)} "
            "are free: capture fewer layers, use another --output_dir, or --upload_to_gcs --delete_local_after_upload"
        ) from OSError(errno.ENOSPC, "disk full")
