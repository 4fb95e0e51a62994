# Each command prepares .venv by itself; a second time it finds it ready.
PYTHON ?= python3
VENV := .venv/bin/python
PIP := PIP_CONSTRAINT=constraints.txt $(VENV) -m pip install --quiet --disable-pip-version-check
NATIVE := $(wildcard csrc/*.* csrc/*/*.*)
SOURCES := pyproject.toml constraints.txt setup.py CMakeLists.txt $(NATIVE)

# What pyproject.toml allows, oldest and newest.
TORCHES := 2.11.0 2.14.1
TORCH ?= $(lastword $(TORCHES))
OTHER = build/torch-$(TORCH)

.PHONY: train test coverage sanitize test-torch test-matrix test-cuda-build dist lint docs bench soak soak-ranks fuzz gpu gpu-kit clean

train: .venv/ready
	$(VENV) -m fastdmd.train $(ARGS)

test: .venv/ready-dev lint
	$(VENV) -m pytest --numprocesses auto --dist worksteal $(ARGS)

# The lines of fastdmd/ that the tests reach without a GPU, in the processes that they start, too: the files below 90 %, and
# the whole, which must not be. Failing tests are told, and do not keep it from being measured. Takes longer than the tests.
coverage: .venv/ready-dev
	rm -rf build/coverage
	-$(VENV) -m coverage run -m pytest --numprocesses auto --dist worksteal $(ARGS)
	$(VENV) -m coverage combine --quiet
	$(VENV) -m coverage report --sort=cover | awk '$$4 == "Cover" || $$4 ~ /%/ && ($$4 + 0 < 90 || $$1 == "TOTAL")'
	$(VENV) -m coverage report --format=total --fail-under=90

# The CUDA kernels, compiled for the CPU under g++'s sanitizers, through the tests of the ops.
sanitize: .venv/ready-dev
	FASTDMD_SANITIZERS=address,undefined $(VENV) -m pytest tests/native/test_cuda_on_cpu.py $(ARGS)

# The tests on another torch, TORCH=2.14.1, in an environment and a copy of the sources of their own; where pip brings
# builds for CUDA, those are several GB. FASTDMD_NATIVE=1: the libraries are built, or this fails. setuptools is as old as
# that torch wants it: 2.11 refuses 82.
test-torch: $(OTHER)/ready
	cd $(OTHER)/sources && $(CURDIR)/$(OTHER)/venv/bin/python -m pytest --numprocesses auto --dist worksteal $(ARGS)

test-matrix:
	for torch in $(TORCHES); do $(MAKE) test-torch TORCH=$$torch || exit 1; done

# On a build of torch for CUDA, and nvcc: both libraries are built, linked and loaded, and have every op. No GPU needed.
test-cuda-build: $(OTHER)/ready
	cd $(OTHER)/sources && $(CURDIR)/$(OTHER)/venv/bin/python -m benchmarks.native_ops

.PHONY: $(OTHER)/ready
$(OTHER)/ready:
	rm -rf $(OTHER)/sources && mkdir -p $(OTHER)/sources
	git ls-files -co --exclude-standard | xargs cp --parents -t $(OTHER)/sources
	sed 's/^torch==.*/torch==$(TORCH)/; /^setuptools==/d' constraints.txt > $(OTHER)/constraints.txt
	test -x $(OTHER)/venv/bin/python || $(PYTHON) -m venv $(OTHER)/venv
	PIP_CONSTRAINT=$(OTHER)/constraints.txt $(OTHER)/venv/bin/python -m pip install --quiet \
		--disable-pip-version-check torch 'setuptools>=70.1' cmake ninja pybind11
	PIP_CONSTRAINT=$(OTHER)/constraints.txt FASTDMD_NATIVE=1 $(OTHER)/venv/bin/python -m pip install --quiet \
		--disable-pip-version-check --no-build-isolation -e '$(OTHER)/sources[dev]'

lint: .venv/ready-dev
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $(NATIVE)
	$(VENV) -m mypy
	.venv/bin/lint-imports --no-logo --no-cache

# sdist and wheel in dist/, built in isolation, then installed and tried as a user would, with and without a compiler.
dist: .venv/ready
	$(PIP) build
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(VENV) tools/dist.py dist

# The pages of build/docs, from README.html on.
docs: .venv/ready-dev
	$(VENV) -m sphinx --fail-on-warning --keep-going --quiet -c tools/docs . build/docs

bench: .venv/ready-dev
	$(VENV) -m benchmarks $(ARGS)

# A real training, killed a hundred times at random moments, and compared with one that was not.
soak: .venv/ready
	$(VENV) -m benchmarks.soak $(ARGS)

# The same of several processes under torchrun.
soak-ranks: .venv/ready
	$(VENV) -m benchmarks.ranks $(ARGS)

# Two thousand bad inputs, each of which has to be refused in a line or read right.
fuzz: .venv/ready-dev
	$(VENV) -W ignore -m benchmarks.fuzz $(ARGS)

# Takes the Python that has a CUDA torch; what else that lacks comes from .gpu-kit, if it is there.
gpu:
	$(PYTHON) -m benchmarks.gpu $(STAGE) $(ARGS)

# Where there is a network.
gpu-kit:
	$(PYTHON) -m benchmarks.kit

.venv/ready-dev: EXTRAS := [dev]
.venv/ready .venv/ready-dev: $(SOURCES)
	test -x $(VENV) || $(PYTHON) -m venv .venv
	$(PIP) torch setuptools cmake ninja pybind11
	$(PIP) --no-build-isolation -e .$(EXTRAS)
	touch .venv/ready $@

clean:
	rm -rf .venv build dist *.egg-info fastdmd/*.so
