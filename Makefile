# Everything is installed into .venv and nothing outside of it. `make` alone lists what there is.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
PY := $(VENV)/bin/python
# What an installation depends on; an editable one follows the Python sources by itself.
BUILT_FROM := pyproject.toml $(wildcard setup.py csrc/*.h csrc/cpu/*)
MODELS := vmamba vim

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 chooses the interpreter of a new .venv, JOBS=8 the processes of the tests."

.PHONY: venv
venv: $(PY) ## an empty virtual environment in .venv

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "make: Python 3.10 or newer is needed; say PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: $(PY) $(BUILT_FROM)
	@echo "Installing into $(VENV) with the extra [$*]: the first time pip downloads about 3 GB, most of it PyTorch with"
	@echo "CUDA, which take 5.5 GB on disk; afterwards only what has changed."
	$(PY) -m pip install --editable '.[$*]'
	@touch $@

.PHONY: demo
demo: $(VENV)/.demo $(MODELS:%=train-%) ## train a small VMamba and a small Vim on handwritten digits, and show what they predict
	@$(PY) tools/predict.py --digits --png output/digits.png --rows 20 \
		$(MODELS:%=--checkpoint output/digits_%/last.pth)

# Trained runs are found again, interrupted ones go on.
.PHONY: $(MODELS:%=train-%)
$(MODELS:%=train-%): train-%: $(VENV)/.demo
	@$(PY) tools/train.py --config configs/digits/$*.yaml --resume auto

.PHONY: test
test: $(VENV)/.test ## the CPU test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_FLAGS)

.PHONY: lint
lint: $(VENV)/.test ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy vision_mamba tools

.PHONY: test-timm
test-timm: $(VENV)/.test ## timm's own model tests, unmodified, on the small models; ALL=1: on every model, hours
	$(PY) tools/test_timm.py $(if $(ALL),,--models 'test_*')

.PHONY: bench
bench: $(VENV)/.test ## time the operators on this machine
	$(PY) tools/bench/run.py

.PHONY: clean
clean: ## remove what was built and trained; .venv stays
	rm -rf build dist output .cache .pytest_cache .mypy_cache .ruff_cache *.egg-info vision_mamba/*.so
	find vision_mamba tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
