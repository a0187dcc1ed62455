"""Activations of other tools, stored as an output of ours, see docs/exporting.md.

Axis letters: L layers, T tokens of a sample, D width.
"""

from analysis.importing.importing import ImportReport, import_activations

__all__ = ["ImportReport", "import_activations"]
