"""The files in launchers/, each read by the tool that it is for: `make test-launchers` installs them and runs this."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHERS = ROOT / "launchers"


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed: make test-launchers")


def run(words: list[str], home: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command of a tool, with a home of its own and this environment's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = os.environ | {"HOME": str(home), "PATH": path, "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"} | environment
    return subprocess.run(words, capture_output=True, text=True, env=variables, cwd=ROOT, check=False, timeout=120)


@needs("sky")
def test_skypilot_reads_its_task(tmp_path):
    script = """if True:
        import json, sys, yaml, sky
        config = yaml.safe_load(open("launchers/skypilot.yaml"))
        task = sky.Task.from_yaml_config(config, env_overrides=[("BUCKET", "b")])
        (resources,) = task.resources
        spot = resources.use_spot
        print(json.dumps([str(resources.cloud), resources.accelerators, spot, resources.accelerator_args, task.envs]))
    """
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode == 0, done.stderr
    cloud, accelerators, spot, arguments, variables = json.loads(done.stdout.splitlines()[-1])
    assert (cloud, accelerators, spot) == ("GCP", {"tpu-v5litepod-8": 1}, True)
    assert arguments["runtime_version"] == "v2-alpha-tpuv5-lite"
    assert variables["BUCKET"] == "b"


@needs("sky")
def test_skypilot_wants_the_bucket_named(tmp_path):
    script = "import sky; sky.Task.from_yaml('launchers/skypilot.yaml')"
    done = run([sys.executable, "-c", script], tmp_path)
    assert done.returncode != 0
    assert "BUCKET" in done.stderr


@needs("kubernetes_validate")
def test_kubernetes_accepts_the_job_and_would_notice_a_slip():
    import kubernetes_validate
    import yaml

    manifest = yaml.safe_load((LAUNCHERS / "gke_job.yaml").read_text())
    for version in ("1.30", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(manifest, version, strict=True)
    manifest["spec"]["backofLimitPerIndex"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, "1.30", strict=True)


@needs("xpk")
def test_xpk_makes_one_pod_for_each_host_of_a_v5e_64(tmp_path):
    import yaml

    manifest = tmp_path / "jobset.yaml"
    flags = [
        "--dataset_path",
        "gs://b/s.jsonl",
        "--grid_encoder",
        "GridShapeEncoder(RowNumberEncoder(x))",
        'it\'s "$(id)"',
    ]
    words = [
        str(LAUNCHERS / "xpk.sh"),
        "--cluster",
        "c",
        "--docker-image",
        "i:1",
        "--tpu-type",
        "v5litepod-64",
        "--spot",
    ]
    words += ["--project", "p", "--zone", "us-central1-a", "--dry-run", "--skip-validation"]
    done = run([*words, "--output-manifest-file", str(manifest), "--", *flags], tmp_path, WORKER_ID="3")
    assert done.returncode == 0, done.stdout + done.stderr
    (job,) = yaml.safe_load(manifest.read_text())["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    assert (spec["parallelism"], spec["completions"]) == (16, 16)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "8x8"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    ends = spec["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (ends["operator"], 1 in ends["values"], 143 in ends["values"]) == ("NotIn", True, True)
    assert 2 not in ends["values"], "wrong flags end the job"
    assert started_by(pod["containers"][0]["command"], tmp_path) == [
        *("extract_activations.py", "--multihost", "--worker_id", "3", *flags)
    ]


def started_by(command: list[str], folder: Path) -> list[str]:
    """What the container's command starts python with."""
    fake = folder / "python"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\0" "$@" >"{folder}/started"\n')
    fake.chmod(0o755)
    script = re.sub(r"sleep \d+", "sleep 0.1", command[-1])
    path = f"{folder}:{os.environ['PATH']}"
    subprocess.run(["bash", "-c", script], env={"PATH": path}, check=False, timeout=60, stdout=subprocess.DEVNULL)
    return (folder / "started").read_text().split("\0")[:-1]


SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed: make test-launchers")
def test_the_shell_scripts_are_clean(tmp_path):
    scripts = [str(path) for folder in ("scripts", "launchers") for path in (ROOT / folder).glob("*.sh")]
    done = run([str(SHELLCHECK), *scripts], tmp_path)
    assert done.returncode == 0, done.stdout


@needs("modal")
def test_modal_finds_its_function_and_entry_point(tmp_path):
    done = run([sys.executable, "-m", "modal", "run", "-m", "launchers.modal_app", "--help"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@needs("modal")
def test_modal_finds_the_mean_with_its_flags(tmp_path):
    done = run([sys.executable, "-m", "modal", "run", "-m", "launchers.modal_mean", "--help"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(flag in done.stdout for flag in ("--num-samples", "--batch-size", "--mode", "--overwrite"))


def test_the_functions_of_the_mean_ask_modal_for_what_is_described(tmp_path, monkeypatch):
    pytest.importorskip("modal", reason="modal is not installed: make test-launchers")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    from launchers import modal_mean

    for function in (modal_mean.extract_single_vector, modal_mean.extract_batch):
        spec = function._spec_  # Modal has no public name for it; its version is pinned
        assert (spec.gpus, spec.memory) == ("A100-80GB", 65536)
        assert spec.volumes[modal_mean.STORED.as_posix()].name == "activation-vectors-cache"
    assert modal_mean.compute_mean_from_batches._spec_.gpus is None


@pytest.fixture
def modal_app(tmp_path, monkeypatch):
    """The module, with the extraction replaced by a few lines that look at what they were given."""
    pytest.importorskip("modal", reason="modal is not installed: make test-launchers")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    from launchers import modal_app

    lines = ["import os, sys", "open(os.environ['SEEN'], 'w').write(repr((sys.argv[1:], os.environ['WORKER_ID'],"]
    lines += ["    open(os.environ['GOOGLE_APPLICATION_CREDENTIALS']).read(), 'GOOGLE_CREDENTIALS' in os.environ)))"]
    lines += ["sys.exit(int(os.environ.get('CODE', 0)))"]
    (tmp_path / "extract_activations.py").write_text("\n".join(lines))
    monkeypatch.setattr(modal_app, "CODE", tmp_path)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("GOOGLE_CREDENTIALS", '{"private": "key"}')
    return modal_app


def test_a_modal_worker_gets_flags_number_and_key_in_memory(modal_app, tmp_path):
    assert modal_app.extract.local(7, ["--max_tasks", "3"]) == 0
    seen = (tmp_path / "seen").read_text()
    assert seen == repr((["--max_tasks", "3"], "7", '{"private": "key"}', False))


def test_modal_starts_a_crashed_worker_again_and_not_one_with_wrong_flags(modal_app, monkeypatch):
    monkeypatch.setenv("CODE", "2")
    assert modal_app.extract.local(0, []) == 2
    monkeypatch.setenv("CODE", "1")
    with pytest.raises(RuntimeError, match="exit code 1"):
        modal_app.extract.local(0, [])


def test_modal_wants_a_bucket(modal_app, capsys):
    with pytest.raises(SystemExit):
        modal_app.main.info.raw_f("--workers", "2", "--dataset_path", "d")
    assert "--gcs_bucket" in capsys.readouterr().err
