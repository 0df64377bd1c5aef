# Two commands: `make serve` and `make test`. Both set up everything they need in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# The accelerator extra follows the CUDA version that the driver reports; none without a GPU (or with
# a driver older than CUDA 12).
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\).*/\1/p' | head -n 1)
ACCELERATOR := $(if $(filter 12,$(CUDA)),cuda12,$(if $(filter-out 9 10 11,$(CUDA)),cuda13))
comma := ,

.PHONY: serve test check clean

serve: $(VENV)/.serve
	$(BIN)/python scripts/serve.py $(ARGS)

test: $(VENV)/.test check
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "meshserve needs Python 3.11 or newer; name one with make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable '.$(if $(ACCELERATOR),[$(ACCELERATOR)])'
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --editable '.[test$(comma)train$(if $(ACCELERATOR),$(comma)$(ACCELERATOR))]'
	@touch $@

clean:
	rm -rf $(VENV)
