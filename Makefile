# make demo | make test | make lint    each sets up .venv by itself, once; needs Python 3.11 or newer and PyPI.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup demo test lint conformance clean

help:
	@echo "make demo [IMAGE=path]  run every tool over MCP on the bundled scenes, or on IMAGE; report in out/demo/"
	@echo "make test [ARGS=...]    run the tests"
	@echo "make lint               ruff and pyright"
	@echo "make conformance        the official suite and inspector of MCP; needs npm [ARGS=--or-skip or names of legs]"
	@echo "make clean              remove reports and caches (keeps $(VENV))"

setup: $(INSTALLED)

# The stamp is newer than both files that say what to install, or the install is repeated (pip then changes little).
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev]" -c constraints.txt
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(if $(IMAGE),"$(IMAGE)")

test: $(INSTALLED)
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/pyright

conformance: $(INSTALLED)
	$(BIN)/python conformance/run.py $(ARGS)

clean:
	rm -rf out .pytest_cache .ruff_cache .hypothesis
	find rs_tools model_server tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
