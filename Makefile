# `make train` and `make test` prepare .venv by themselves; a second time they find it ready.
PYTHON ?= python3
VENV := .venv/bin/python

.PHONY: train test lint clean

train: .venv/ready
	$(VENV) -m fastdmd.train $(ARGS)

test: .venv/ready lint
	$(VENV) -m pytest $(ARGS)

lint: .venv/ready
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .

.venv/ready: pyproject.toml constraints.txt setup.py CMakeLists.txt $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(VENV) || $(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(VENV) -m pip install --quiet --disable-pip-version-check torch setuptools cmake
	PIP_CONSTRAINT=constraints.txt $(VENV) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .[dev]
	touch $@

clean:
	rm -rf .venv build *.egg-info
