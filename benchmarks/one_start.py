"""One start of the engine, for benchmarks.start: does what `core.run.runner` does and reads the clock between stages.

argv: the fields of a RunConfig as JSON. Prints when each stage ended, in seconds since 1970, as JSON. The top of the
file imports nothing that a stage would have to import.
"""

import json
import sys
import time


def main() -> None:
    """Runs all stages, to the end of the stream."""
    over = {"interpreter": time.time()}
    import threading

    from core.hosts.pod_slice import SINGLE_HOST
    from core.hosts.session import HostSession
    from core.run.checks import backend_of, prepare_job
    from core.run.config import RunConfig
    from core.run.runner import enable_compilation_cache
    from core.run.stores import open_storage, open_stores
    from core.run.stream_run import load, prepare_stream, run_stream

    over["imports"] = time.time()
    config = RunConfig(**json.loads(sys.argv[1]))
    backend = backend_of(config)
    enable_compilation_cache(config.compilation_cache_dir)
    job = prepare_job(config, backend.compute_dtype(config.compute_dtype))
    over["job"] = time.time()
    prepared = prepare_stream(job, open_storage(job, open_stores(config)))
    over["first window"] = time.time()
    model = load(job, prepared.first_shape)
    over["load"] = time.time()
    run_stream(prepared, model, HostSession(SINGLE_HOST, "run", threading.Event()), log=lambda line: None)
    over["first shard"] = time.time()
    print(json.dumps(over))


if __name__ == "__main__":
    main()
