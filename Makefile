# make demo   train a small VMamba and a small Vim on real digits and draw what they predict
# make test   the whole test suite on the CPU
# make help   the rest
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# What an installed copy depends on: the metadata, the build and the sources that are compiled.
PARTS := pyproject.toml setup.py $(wildcard csrc/*.h csrc/cpu/*)

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint test-timm bench clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

$(PY):
	$(PYTHON) -m venv $(VENV)

# One file for each set of extras, touched when it is installed: what is there already is not installed again.
$(VENV)/.installed-%: $(PARTS) | $(PY)
	@echo "Installing into $(VENV): the first time torch and its libraries are fetched, about 5.5 GB on disk."
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

venv: $(VENV)/.installed-test ## set up .venv with all that development needs

demo: $(VENV)/.installed-demo ## train on the handwritten digits and predict, in minutes on 2 cores
	$(PY) tools/demo.py

test: $(VENV)/.installed-test ## the whole test suite, on the CPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-test ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy vision_mamba tools

test-timm: $(VENV)/.installed-test ## timm's own model tests on every model of ours
	$(PY) tools/test_timm.py

bench: $(VENV)/.installed-test ## time the scans on this machine
	$(PY) -m tools.bench.run

clean: ## remove what was built, but neither .venv nor results
	rm -rf build dist output .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info vision_mamba/*.so
