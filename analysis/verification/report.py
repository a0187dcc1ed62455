"""The result of a verification."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class FolderReport:
    """The result for one worker's folder. Any problem makes the whole verification fail; a warning does not."""

    folder: str
    shards: int = 0
    samples: int = 0
    tokens: int = 0
    bytes: int = 0
    lines_done: int = 0
    complete: bool = False
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class VerificationReport:
    """The results for the folders of an output, and the problems and warnings beyond single folders."""

    url: str
    folders: tuple[FolderReport, ...]
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether neither the output nor a folder of it has a problem."""
        return not self.problems and not any(folder.problems for folder in self.folders)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return {"ok": self.ok} | asdict(self)

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = []
        for report in self.folders:
            state = "complete" if report.complete else "not finished"
            if report.problems:
                state = _count_problems(len(report.problems))
            counts = f"{report.shards} shards, {report.samples} samples, {report.tokens} tokens, {report.bytes} bytes"
            lines.append(f"{report.folder}: {counts}, {state}")
            lines += [f"{report.folder}: PROBLEM: {problem}" for problem in report.problems]
            lines += [f"{report.folder}: note: {warning}" for warning in report.warnings]
        lines += [f"PROBLEM: {problem}" for problem in self.problems]
        lines += [f"note: {warning}" for warning in self.warnings]
        return [*lines, self._verdict()]

    def _verdict(self) -> str:
        if self.ok:
            shards, samples, tokens = (
                sum(getattr(f, n) for f in self.folders) for n in ("shards", "samples", "tokens")
            )
            return f"verified: {shards} shards, {samples} samples, {tokens} tokens"
        return _count_problems(len(self.problems) + sum(len(folder.problems) for folder in self.folders))


def _count_problems(count: int) -> str:
    return "1 problem" if count == 1 else f"{count} problems"
