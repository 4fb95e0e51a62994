# Each command prepares .venv by itself; a second time it finds it ready.
PYTHON ?= python3
VENV := .venv/bin/python
PIP := PIP_CONSTRAINT=constraints.txt $(VENV) -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: train test sanitize lint bench gpu clean

train: .venv/ready
	$(VENV) -m fastdmd.train $(ARGS)

test: .venv/ready-dev lint
	$(VENV) -m pytest --numprocesses auto --dist worksteal $(ARGS)

# The CUDA kernels, compiled for the CPU under g++'s sanitizers, through the tests of the ops.
sanitize: .venv/ready-dev
	FASTDMD_SANITIZERS=address,undefined $(VENV) -m pytest tests/test_cuda_on_cpu.py $(ARGS)

lint: .venv/ready-dev
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

bench: .venv/ready-dev
	$(VENV) -m benchmarks.bench_ops $(ARGS)

# Takes the Python that has a CUDA torch, and prepares nothing.
gpu:
	$(PYTHON) -m benchmarks.gpu $(STAGE)

.venv/ready-dev: EXTRAS := [dev]
.venv/ready .venv/ready-dev: $(SOURCES)
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools cmake ninja pybind11
	$(PIP) --no-build-isolation -e .$(EXTRAS)
	touch .venv/ready $@

clean:
	rm -rf .venv build *.egg-info fastdmd/*.so
