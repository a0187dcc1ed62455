"""setup_tpu_vm.sh: an environment once, whatever happened before."""

import os
import subprocess
from pathlib import Path

import pytest
from vm import SCRIPTS, write_program, write_vm


@pytest.fixture
def vm(tmp_path):
    """A VM with a released python3.12; returns what runs the set-up there."""
    write_vm(tmp_path / "bin")

    def setup(*flags: str) -> "subprocess.CompletedProcess[str]":
        environment = {"HOME": str(tmp_path), "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
        call = ["bash", str(SCRIPTS / "setup_tpu_vm.sh"), *flags]
        return subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=60)

    return setup


def installs(tmp_path: Path) -> list[str]:
    log = tmp_path / "pip.log"
    return log.read_text().splitlines() if log.exists() else []


def test_it_installs_the_tpu_extra_with_the_pinned_versions(vm, tmp_path):
    assert vm().returncode == 0
    (call,) = installs(tmp_path)
    assert "--constraint" in call
    assert "constraints.txt" in call
    assert call.endswith(f"--editable {SCRIPTS.parent}[tpu]")


def test_a_second_time_it_installs_nothing(vm, tmp_path):
    vm()
    assert "up to date" in vm().stdout
    assert len(installs(tmp_path)) == 1


def test_another_extra_is_installed(vm, tmp_path):
    vm()
    vm("--extra", "cuda")
    assert [call.rpartition("[")[2] for call in installs(tmp_path)] == ["tpu]", "cuda]"]


def test_an_install_that_failed_is_tried_again(vm, tmp_path):
    python = tmp_path / "bin/python3.12"
    whole = python.read_text()
    write_program(python, whole.replace('echo "$@" >>"$HOME/pip.log"', "exit 1"))
    assert vm().returncode != 0
    assert installs(tmp_path) == []
    write_program(python, whole)
    write_program(tmp_path / "activations/venv/bin/python", whole)
    assert vm().returncode == 0
    assert len(installs(tmp_path)) == 1


def test_an_install_that_failed_over_a_good_one_leaves_neither(vm, tmp_path):
    vm()
    python = tmp_path / "activations/venv/bin/python"
    whole = python.read_text()
    write_program(python, whole.replace('echo "$@" >>"$HOME/pip.log"', "exit 1"))
    assert vm("--extra", "cuda").returncode != 0
    write_program(python, whole)
    assert vm().returncode == 0
    assert len(installs(tmp_path)) == 2


def test_without_a_released_python_it_fetches_one(vm, tmp_path):
    """As on Ubuntu 22.04, whose python3.11 is a release candidate."""
    folder = tmp_path / "bin"
    fetched = tmp_path / "fetched/python3.12"
    write_program(fetched, (folder / "python3.12").read_text())
    for name in ("python3.12", "python3.11"):
        write_program(folder / name, "#!/bin/sh\nexit 1\n")
    uv = f'[ "$2 $3 $4" = "uv python find" ] && echo {fetched}\n[ "$1" != -c ]'
    write_program(folder / "python3", f'#!/bin/sh\necho "$@" >>{tmp_path}/python3.log\n{uv}\n')
    fetched.write_text(fetched.read_text().replace(f'"{folder}/python3.12"', f'"{fetched}"'))
    assert vm().returncode == 0
    log = (tmp_path / "python3.log").read_text()
    assert "uv python install --quiet 3.12" in log
    assert len(installs(tmp_path)) == 1


def test_what_it_does_not_know_is_a_usage_error(vm, tmp_path):
    assert vm("--extra", "tpu]; reboot").returncode == 2
    assert vm("--colour").returncode == 2
    assert installs(tmp_path) == []


def test_it_is_executable():
    assert all(os.access(script, os.X_OK) for script in SCRIPTS.glob("*.sh"))
