# Each command prepares .venv by itself; a second time it finds it ready.
PYTHON ?= python3
VENV := .venv/bin/python
PIP := PIP_CONSTRAINT=constraints.txt $(VENV) -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: train test lint bench gpu gpu-kit clean

train: .venv/ready
	$(VENV) -m fastdmd.train $(ARGS)

test: .venv/ready-dev lint
	$(VENV) -m pytest --numprocesses auto --dist worksteal $(ARGS)

lint: .venv/ready-dev
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

bench: .venv/ready-dev
	$(VENV) -m benchmarks.bench_ops $(ARGS)

# Takes the Python that has a CUDA torch; what else that lacks comes from .gpu-kit, if it is there.
gpu:
	$(PYTHON) -m benchmarks.gpu $(STAGE)

# Where there is a network.
gpu-kit:
	$(PYTHON) -m benchmarks.kit

.venv/ready-dev: EXTRAS := [dev]
.venv/ready .venv/ready-dev: $(SOURCES)
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools cmake
	$(PIP) --no-build-isolation -e .$(EXTRAS)
	touch .venv/ready $@

clean:
	rm -rf .venv build *.egg-info fastdmd/*.so
