# `make demo` and `make test` work on a fresh clone with Python 3.11 or newer and nothing else: they install what they need into .venv, once.
# Another interpreter: make PYTHON=python3.13 test (after make clean). More arguments for the program behind a target: make test ARGS="-k hash".

PYTHON ?= python3
CUDA ?= $(shell $(BIN)/python -c 'import torch; print("cuda" + (torch.version.cuda or "13").partition(".")[0])')
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-quick test-long test-environments lint types dist tutorials bench bench-gpu clean
.DELETE_ON_ERROR:

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/installed-demo $(VENV)/compiled-demo ## YOSO attention on a real text, a model trained on it: tables, and a figure in yoso_demo.png; a minute
	$(BIN)/yoso demo $(ARGS)

test: $(VENV)/installed-dev ## the tests, on all cores; ARGS="-k hash" for some
	$(BIN)/pytest --numprocesses auto --dist worksteal $(ARGS)

test-quick: $(VENV)/installed-dev ## in a minute: one case of each test for every kernel, operation and head, nothing slow
	$(BIN)/pytest --numprocesses auto --dist worksteal --quick $(ARGS)

test-long: $(VENV)/installed-dev ## those that take up to a minute each: tutorials that train models, type checkers on a script
	$(BIN)/pytest --numprocesses auto --dist worksteal -m long $(ARGS)

test-environments: $(VENV)/installed-dev ## tests of what is printed and drawn, with three other terminals, locales and home folders
	$(BIN)/python .ci/environments.py $(ARGS)

lint: $(VENV)/installed-dev ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev ## mypy, strict, over the whole package
	$(BIN)/mypy -p yoso_core

dist: $(VENV)/installed-dev ## build the sdist and the wheel, install each elsewhere and use it there
	rm -rf build dist
	$(BIN)/python -m build --no-isolation --outdir dist . >/dev/null
	$(BIN)/python .ci/check_dist.py dist/*.tar.gz dist/*.whl

tutorials: $(VENV)/installed-dev ## run every tutorial and build the notebooks and their index; ARGS="3 4" for some
	$(BIN)/python -m yoso_core.tutorials.build $(ARGS)

bench: $(VENV)/installed-dev ## measured cost beside the peers, on this machine's CPU
	$(BIN)/yoso bench cpu $(ARGS)

# One CUDA for all in a process: that of torch, which is known once torch is there.
bench-gpu: $(VENV)/installed-dev ## the same on this machine's NVIDIA GPU, with the CUDA that torch is built for (CUDA=cuda12 for another)
	@$(MAKE) --no-print-directory $(VENV)/installed-$(CUDA)
	$(BIN)/yoso bench gpu $(ARGS)

clean: ## back to a fresh clone
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "yoso_core needs Python 3.11 or newer, '$(PYTHON)' is not: name one with make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# An empty file that says: installed with this extra since these files last changed.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "Installing yoso_core[$*] into $(VENV); the first time takes a few minutes"
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $@

# The same, of the kernels that the demo needs: Numba keeps them beside their sources.
$(VENV)/compiled-demo: $(wildcard cpu/*.py) | $(VENV)/installed-demo
	@echo "Compiling the kernels of the demo, once: about a minute"
	@$(BIN)/python -P -m yoso_core.demo.compiling everything
	@touch $@
