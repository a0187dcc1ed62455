"""A child process in which torch is not installed."""

from pathlib import Path

from tiny_run import REPOSITORY


def hide_torch(folder: Path) -> dict[str, str]:
    """The environment of that child; `folder` gets what makes Python forget torch at its start."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    return {"PYTHONPATH": f"{folder}:{REPOSITORY}"}
