"""What the files in launchers/ start are our commands with flags that our parsers take."""

import shlex
from pathlib import Path

import pytest

from extract_activations import build_parser
from fleet.bundle import code_files

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]


def test_the_flags_of_the_skypilot_task_are_ours():
    task = yaml.safe_load((ROOT / "launchers/skypilot.yaml").read_text())
    words = shlex.split(task["run"].replace("\\\n", " "))
    at = words.index("--")
    assert words[:3] == ["bash", "scripts/supervise.sh", "run"]
    assert words[at + 2] == "$PWD/extract_activations.py"
    assert build_parser().parse_args(words[at + 3 :]).use_sharded_dataset
    assert task["setup"] == "bash scripts/setup_tpu_vm.sh"


def test_the_flags_of_the_kubernetes_job_are_ours():
    job = yaml.safe_load((ROOT / "launchers/gke_job.yaml").read_text())["spec"]
    (container,) = job["template"]["spec"]["containers"]
    words = [word.replace("$(WORKER_ID)", "3") for word in container["args"]]
    assert build_parser().parse_args(words).worker_id == 3
    assert container["resources"]["requests"] == container["resources"]["limits"] == {"google.com/tpu": 8}
    assert job["completions"] == job["parallelism"] == job["maxFailedIndexes"]


def test_the_image_is_built_from_the_bundle_and_all_of_it():
    assert ROOT / "launchers/Dockerfile" in code_files(ROOT)
    assert "\nCOPY . .\n" in (ROOT / "launchers/Dockerfile").read_text()


def test_launcher_files_hold_no_secret_in_the_clear():
    for path in (ROOT / "launchers").iterdir():
        if path.is_file():
            assert "hf_" not in path.read_text()
            assert "private_key" not in path.read_text()
