"""Exports committed activations: the plan, a loop over its files, and the metadata of the other format."""

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from absl import logging

from analysis.exporting import stored_export
from analysis.exporting.files import ExportedFile, FileTask, export_file
from analysis.exporting.items.request import ItemCut
from analysis.exporting.planning import ExportPlan, plan_export
from analysis.exporting.targets import TARGETS, ExportTarget
from core.base.canonical_json import content_hash
from core.base.dtypes import DTYPES
from core.base.errors import RunError, UsageError
from core.object_store import Created, open_store
from core.reading import Activations, open_activations
from core.reading.dropping import Dropping, Rule, dropping

_REPORT_S = 10.0
Run = Callable[[Iterable[FileTask]], Iterator[ExportedFile]]
"""Runs tasks anywhere, and yields their files in any order."""


@dataclass(frozen=True)
class ExportReport:
    """A finished export. n_kept: files that an earlier run had finished. The other counts: see `ExportPlan`."""

    output: str
    to: str
    hook_name: str
    files: int
    n_kept: int
    bytes: int
    items: int
    tokens: int
    n_dropped: int
    n_short: int
    n_left_over: int
    context_size: int | None

    def to_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)

    def lines(self) -> list[str]:
        """As text: what was written, and what was left out."""
        many = f"rows of {self.context_size} tokens" if self.context_size != 1 else "rows"
        items = "samples" if self.context_size is None else many
        lines = [
            f"exported {self.hook_name} as {self.to}: {self.files} files, {self.items} {items}, {self.tokens} tokens, "
            f"{self.bytes} bytes: {self.output}"
        ]
        lines += [f"kept {self.n_kept} files of an earlier run"] * bool(self.n_kept)
        lines += [f"left out {self.n_dropped} tokens by --drop"] * bool(self.n_dropped)
        short = f"left out {self.n_short} tokens at the ends of samples, which fill no context of {self.context_size}"
        lines += [short] * bool(self.n_short)
        lines += [f"left out {self.n_left_over} rows that fill no file of equal size"] * bool(self.n_left_over)
        return lines


def export(
    url: str,
    to: str,
    *,
    output: str,
    layer: int | None = None,
    site: str | None = None,
    dtype: str | None = None,
    context_size: int | None = None,
    drop: Rule | Iterable[Rule] | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    file_mb: float | None = None,
    hook_name: str | None = None,
    run: Run | None = None,
) -> ExportReport:
    """Exports one layer of the activations at `url` to the folder `output`; continues an export that was interrupted.

    Args:
      to: a name among `TARGETS`.
      layer, site: may be left out where the run has one.
      dtype: of the values; None: as stored (of reduced rows: float32).
      context_size: tokens of a row; None: what the target usually takes, or whole samples.
      drop, tokenizer: as of `Activations.tokens`.
      file_mb: million bytes of values in a file, at most.
      run: runs the tasks; None: one after the other in this process.

    Raises UsageError for what cannot be exported so, RunError for damaged activations or a full disk.
    """
    acts = open_activations(url)
    options = _Options(layer, site, dtype, context_size, dropping(drop, tokenizer), seed, file_mb, hook_name)
    return _execute(_plan(acts, _target(to), output, options), run or _one_by_one)


@dataclass(frozen=True)
class _Options:
    """The arguments of `export` of these names."""

    layer: int | None
    site: str | None
    dtype: str | None
    context_size: int | None
    drop: Dropping
    seed: int
    file_mb: float | None
    hook_name: str | None


def _execute(plan: ExportPlan, run: Run) -> ExportReport:
    """Writes the files that are missing, then those beside them."""
    store = open_store(plan.output)
    files = stored_export.begin(store, plan.identity())
    n_kept, was_finished = len(files), stored_export.is_finished(store)
    progress = _Progress(len(plan.ends), n_kept)
    done = set(files)
    for file in run(task for task in plan.tasks() if task.number not in done):
        stored_export.add_file(store, file)
        files[file.number] = file
        progress.add(file)
    ordered = [files[number] for number in range(len(plan.ends))]
    if not was_finished:
        target = TARGETS[plan.request.to]
        for name, data in target.metadata(plan.request, [file.to_json() for file in ordered]).items():
            if store.create_bytes(name, data) is Created.ALREADY_DIFFERENT:
                raise RunError(f"{store.url}/{name} exists with other content: remove it, or use another --output")
    report = _report(plan, ordered, n_kept, store.url)
    counts = {name: getattr(report, name) for name in ("items", "tokens", "n_dropped", "n_short", "n_left_over")}
    stored_export.finish(store, plan.identity(), ordered, counts)
    return report


def _one_by_one(tasks: Iterable[FileTask]) -> Iterator[ExportedFile]:
    return map(export_file, tasks)


def _target(to: str) -> ExportTarget:
    if to not in TARGETS:
        raise UsageError(f"{to!r} is no format to export to: choose from {', '.join(TARGETS)}")
    needs = TARGETS[to].traits.needs
    if needs is not None and importlib.util.find_spec(needs) is None:
        extra = "torch" if needs == "torch" else "datasets"
        raise UsageError(f"exporting to {to} needs {needs}: pip install -c constraints.txt -e '.[{extra}]'")
    return TARGETS[to]


def _plan(acts: Activations, target: ExportTarget, output: str, options: _Options) -> ExportPlan:
    traits, first = target.traits, acts.parts[0]
    site = first.site(options.site)
    layer = first.layer(site, options.layer)
    size = options.context_size
    if first.pools and (traits.needs_tokens or size or options.drop != Dropping()):
        raise UsageError(f"{acts.url}: its rows are pools: export them as parquet, arrow, npz or safetensors, whole")
    if size is not None and size < 1:
        raise UsageError(f"a context of {size} tokens: expected 1 or more")
    model = acts.identity.get("model", {})
    described = {"run": content_hash(acts.identity), "family": model.get("family"), "model": model}
    return plan_export(
        output,
        acts.parts,
        ItemCut(site, layer, options.drop, traits.context_size if size is None else size, traits.keeps_short),
        traits,
        to=target.name,
        width=acts.width(site),
        dtype=_dtype(acts, target, options.dtype),
        hook_name=options.hook_name or target.hook_name(site, layer),
        seed=options.seed,
        file_bytes=traits.file_bytes if options.file_mb is None else max(1, int(options.file_mb * 1e6)),
        described=described | {"stored_dtype": acts.dtype},
    )


def _dtype(acts: Activations, target: ExportTarget, asked: str | None) -> str:
    stored = acts.dtype if acts.dtype in DTYPES else "float32"
    dtype = asked or stored
    if dtype not in target.traits.dtypes:
        choices = " or ".join(f"--dtype {name}" for name in target.traits.dtypes)
        what = f"the activations are {stored}, which" if asked is None else dtype
        raise UsageError(f"{what} {target.name} does not have: use {choices}")
    return dtype


def _report(plan: ExportPlan, files: list[ExportedFile], n_kept: int, url: str) -> ExportReport:
    request = plan.request
    return ExportReport(
        output=url,
        to=request.to,
        hook_name=request.hook_name,
        files=len(files),
        n_kept=n_kept,
        bytes=sum(file.bytes for file in files),
        items=sum(file.n_items for file in files),
        tokens=sum(file.n_rows for file in files),
        n_dropped=plan.n_dropped,
        n_short=plan.n_short,
        n_left_over=plan.n_left_over,
        context_size=request.cut.context_size,
    )


class _Progress:
    """Says now and then how far an export is."""

    def __init__(self, n_files: int, n_kept: int) -> None:
        self._n_files, self._done, self._bytes = n_files, n_kept, 0
        self._started = self._said = time.monotonic()

    def add(self, file: ExportedFile) -> None:
        """Counts a file."""
        self._done, self._bytes = self._done + 1, self._bytes + file.bytes
        now = time.monotonic()
        if now - self._said >= _REPORT_S:
            self._said = now
            rate = self._bytes / 1e6 / (now - self._started)
            logging.info("%d of %d files, %.0f MB, %.0f MB/s", self._done, self._n_files, self._bytes / 1e6, rate)
