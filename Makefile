# `make demo` and `make test` set up .venv by themselves, once, and again when setup.py changes.
.PHONY: help demo test lint clean
.DEFAULT_GOAL := help

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --progress-bar off

help:
	@echo "make demo    train a small CHIAR model on two processes and draw the run into runs/demo"
	@echo "make test    linters, types and all tests"
	@echo "make lint    linters and types only"
	@echo "make clean   remove .venv and what the tools left; runs/ stays"

demo: $(STAMP)
	@$(VENV)/bin/python examples/demo_cpu/run.py $(if $(TEXT),--text $(TEXT))

# Tests of one process share the cores; those that start several ranks have them to themselves.
test: lint
	@$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal tests/unit
	@$(VENV)/bin/python -m pytest --ignore=tests/unit

lint: $(STAMP)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info

# Torch comes first and alone: one exact version, so that nothing after it picks another build.
$(STAMP): setup.py
	@python=""; \
	for candidate in $(PYTHON) python3.11 python3 python3.12 python3.10 python3.13; do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; \
	  then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No Python >= 3.10 with venv was found: install one (Debian: python3-venv), or make PYTHON=/path/to/python3." >&2; \
	  exit 1; \
	fi; \
	echo "Setting up $(VENV) with $$($$python --version): a few minutes, once."; \
	[ -x $(VENV)/bin/python ] || $$python -m venv $(VENV)
	@$(PIP) torch==2.13.0
	@$(PIP) -e '.[dev,huggingface,deepspeed,scaling,wandb,tensorboard]'
	@touch $(STAMP)
