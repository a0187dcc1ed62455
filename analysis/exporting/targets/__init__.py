"""The formats of other tools that activations are exported to. A new one is a new file here and a line in TARGETS."""

from analysis.exporting.targets.activault_files import ActivaultTarget
from analysis.exporting.targets.base import ExportTarget, FileContent, TargetTraits
from analysis.exporting.targets.hub_parquet import HubParquetTarget
from analysis.exporting.targets.llamascopium_chunks import LlamascopiumTarget
from analysis.exporting.targets.padded_npz import PaddedNpzTarget
from analysis.exporting.targets.sae_lens_folder import SaeLensTarget
from analysis.exporting.targets.safetensors_files import SafetensorsTarget
from analysis.exporting.targets.saved_dataset import SavedDatasetTarget

TARGETS: dict[str, ExportTarget] = {
    target.name: target
    for target in (
        PaddedNpzTarget(),
        HubParquetTarget(),
        SavedDatasetTarget(),
        SafetensorsTarget(),
        SaeLensTarget(),
        LlamascopiumTarget(),
        ActivaultTarget(),
    )
}

__all__ = ["TARGETS", "ExportTarget", "FileContent", "TargetTraits"]
