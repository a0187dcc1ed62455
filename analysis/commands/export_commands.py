"""`analyze_activations.py export` and `import`, and their functions with plain arguments."""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from analysis.commands.pass_flags import print_report
from core.base.arguments import path_text
from core.base.command_line import not_negative, positive
from core.base.dtypes import DTYPES
from core.shards.formats import FORMATS

if TYPE_CHECKING:
    from analysis.exporting import ExportReport
    from analysis.importing import ImportReport

# The keys of registries that are not imported for every command.
EXPORT_FORMATS = ("npz", "parquet", "arrow", "safetensors", "sae_lens", "llamascopium", "activault")
IMPORT_KINDS = ("vllm", "sae_lens")


def add_export(commands: argparse._SubParsersAction) -> Iterator[argparse.ArgumentParser]:
    """The flags of both commands."""
    yield _add_export(commands)
    yield _add_import(commands)


def export(
    dir: str,
    to: str,
    *,
    output: str,
    layer: int | None = None,
    site: str | None = None,
    dtype: str | None = None,
    context_size: int | None = None,
    drop: "str | int | Iterable[str | int] | None" = None,
    tokenizer_path: str | None = None,
    seed: int = 0,
    file_mb: float | None = None,
    hook_name: str | None = None,
) -> "ExportReport":
    """Exports one layer of an output in the format of another tool, see docs/exporting.md.

    Continues an export that was interrupted. Raises UsageError for what cannot be exported so, RunError for damaged
    activations or a full disk.
    """
    from analysis.exporting import export as exporting

    return exporting(
        path_text(dir, "dir"),
        to,
        output=path_text(output, "output"),
        layer=layer,
        site=site,
        dtype=dtype,
        context_size=context_size,
        drop=drop,
        tokenizer=None if tokenizer_path is None else _tokenizer(path_text(tokenizer_path, "tokenizer_path")),
        seed=seed,
        file_mb=file_mb,
        hook_name=hook_name,
    )


def _tokenizer(path: str) -> Any:
    from qwen2_jax import load_tokenizer

    return load_tokenizer(path)


def import_activations(
    source: str,
    kind: str,
    *,
    output: str,
    site: str = "residual",
    layers: Sequence[int] | None = None,
    format: str = "safetensors",
    dtype: str | None = None,
    shard_size_gb: float = 1.0,
) -> "ImportReport":
    """Stores activations of another tool (`vllm` or `sae_lens`) as an output of ours, see docs/exporting.md.

    layers: the numbers of the layers in `source`, in its order; None: those that it names, or 0, 1, ….
    Raises UsageError for what is not there or does not fit, RunError for damaged files.
    """
    from analysis.importing import import_activations as importing

    return importing(
        path_text(source, "source"),
        kind,
        output=path_text(output, "output"),
        site=site,
        layers=None if layers is None else tuple(layers),
        shard_format=format,
        dtype=dtype,
        shard_bytes=int(shard_size_gb * 2**30),
    )


def _add_export(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    exporting = commands.add_parser("export", help="write one layer in the format of another tool")
    # Otherwise argparse takes `-8:` in `--drop -8:` for an unknown flag.
    exporting._negative_number_matcher = re.compile(r"-[0-9.]+(:-?[0-9]*)?$")
    add = exporting.add_argument
    add("dir", help="the output folder of a run, local or a URL, or one worker's folder in it")
    add("--to", required=True, choices=EXPORT_FORMATS, help="the format, see docs/exporting.md")
    add("--output", required=True, help="an empty folder, local or gs://, or that of an interrupted export")
    add("--layer", type=int, help="may be left out where one is stored")
    add("--site", help="may be left out where one is stored")
    add("--dtype", choices=tuple(DTYPES), help="of the exported values (default: as stored)")
    add("--context_size", type=positive(int), metavar="N", help="tokens of a row (default: that of the format)")
    add("--drop", nargs="+", default=(), metavar="RULE", help="first, START:STOP, a token id, bos, pad, eos, special")
    add("--tokenizer_path", help="for the kinds of tokens of --drop")
    add("--seed", type=not_negative(int), default=0, help="of the shuffle of sae_lens and activault (default 0)")
    add("--file_mb", type=positive(float), metavar="MB", help="values in a file, at most (default: that of the format)")
    add("--hook_name", help="what the other tool calls the place (default: its usual name)")
    exporting.set_defaults(run=export_command)
    return exporting


def export_command(args: argparse.Namespace) -> None:
    """Exports, and prints what was written and what was left out."""
    names = ("output", "layer", "site", "dtype", "context_size", "tokenizer_path", "seed", "file_mb", "hook_name")
    drop = [int(rule) if rule.isdecimal() else rule for rule in args.drop]
    report = export(args.dir, args.to, drop=drop, **{name: getattr(args, name) for name in names})
    print_report(report, args)


def _add_import(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    importing = commands.add_parser("import", help="store activations of another tool as an output of ours")
    add = importing.add_argument
    add("source", help="a folder of that tool")
    add("--from", dest="kind", required=True, choices=IMPORT_KINDS, help="the tool")
    add("--output", required=True, help="the output folder, local or gs://")
    add("--site", default="residual", help="what the activations are called (default residual)")
    add("--layers", type=int, nargs="+", metavar="LAYER", help="their numbers, in the order of the source")
    add("--format", choices=tuple(FORMATS), default="safetensors", help="of the shards (default safetensors)")
    add("--dtype", choices=tuple(DTYPES), help="of the stored values (default: as they are)")
    add("--shard_size_gb", type=positive(float), default=1.0, help="size of a shard before compression (default 1.0)")
    importing.set_defaults(run=import_command)
    return importing


def import_command(args: argparse.Namespace) -> None:
    """Imports, and prints what was stored."""
    names = ("output", "site", "layers", "format", "dtype", "shard_size_gb")
    print_report(import_activations(args.source, args.kind, **{name: getattr(args, name) for name in names}), args)
