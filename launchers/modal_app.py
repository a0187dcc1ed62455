"""The extraction on GPUs of Modal, one container for each worker.

    modal run -m launchers.modal_app --workers 4 --use_sharded_dataset \\
        --sharded_dataset_dir gs://your-bucket/sharded_dataset --upload_to_gcs --gcs_bucket your-bucket

All flags except --workers go to extract_activations.py. The output must be a bucket: on a volume of Modal the last
writer of a file wins, but workers rely on the first writer winning. The Modal secret `activations` holds environment
variables: GOOGLE_CREDENTIALS, the JSON key of a service account that may write to the bucket, and HF_TOKEN if the model
needs it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import modal

CODE = Path("/code")
USAGE = 2


def build_image() -> modal.Image:
    """CUDA wheels of JAX and this checkout."""
    from fleet.bundle import code_files  # Modal imports this file in the container too, where there is no `fleet`

    root = Path(__file__).resolve().parents[1]
    code = {path.relative_to(root) for path in code_files(root)}
    image = modal.Image.debian_slim(python_version="3.12")
    image = image.add_local_dir(root, str(CODE), copy=True, ignore=lambda path: path not in code)
    return image.run_commands(f"pip install --constraint {CODE}/constraints.txt --editable '{CODE}[cuda]'")


app = modal.App("activations", image=build_image() if modal.is_local() else None)
models = modal.Volume.from_name("activations-models", create_if_missing=True)


@app.function(
    gpu=os.environ.get("ACTIVATIONS_GPU", "A100"),
    timeout=24 * 3600,
    retries=modal.Retries(max_retries=10, initial_delay=5.0),
    secrets=[modal.Secret.from_name("activations")],
    volumes={"/root/.cache/huggingface": models},
)
def extract(worker_id: int, flags: list[str]) -> int:
    """One worker. A crash raises, so that Modal starts the worker again; wrong flags do not raise."""
    environment = os.environ | {"WORKER_ID": str(worker_id)}
    key = environment.pop("GOOGLE_CREDENTIALS", None)
    if key is None:
        raise RuntimeError("the Modal secret `activations` has no GOOGLE_CREDENTIALS")
    # In memory, under a descriptor that the command inherits, so that the key is not in any file.
    descriptor = os.memfd_create("credentials", 0)
    os.write(descriptor, key.encode())
    environment["GOOGLE_APPLICATION_CREDENTIALS"] = f"/proc/self/fd/{descriptor}"
    call = [sys.executable, str(CODE / "extract_activations.py"), *flags]
    code = subprocess.run(call, env=environment, pass_fds=[descriptor], cwd="/tmp", check=False).returncode
    os.close(descriptor)
    if code not in (0, USAGE):
        raise RuntimeError(f"worker {worker_id} ended with exit code {code}")
    return code


@app.local_entrypoint()
def main(*words: str) -> None:
    """Starts the workers and waits for them."""
    parser = argparse.ArgumentParser(prog="modal run -m launchers.modal_app", allow_abbrev=False)
    parser.add_argument("--workers", type=int, default=1, help="containers, each with one GPU (default 1)")
    args, flags = parser.parse_known_args(words)
    flags = [flag for flag in flags if flag != "--"]
    if not {"--gcs_bucket", "--output_dir"} & {flag.partition("=")[0] for flag in flags}:
        parser.error("an output is missing: give --upload_to_gcs --gcs_bucket your-bucket")
    codes = list(extract.starmap((worker, flags) for worker in range(args.workers)))
    sys.exit(max(codes))
