"""Committed activations in the formats of other tools, see docs/exporting.md.

Axis letters of this package: I items of a block or file, N rows of all of them, C rows of a context, D width.
An item is what becomes one entry of the other format: a sample, or a context (consecutive stored tokens of a sample).
"""

from analysis.exporting.exporting import ExportReport, export
from analysis.exporting.files import ExportedFile, FileTask, export_file
from analysis.exporting.planning import ExportPlan, plan_export

__all__ = ["ExportPlan", "ExportReport", "ExportedFile", "FileTask", "export", "export_file", "plan_export"]
