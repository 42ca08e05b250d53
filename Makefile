# Two commands on a machine with Python 3.11 or newer and make: `make demo` and `make test`.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
OUT := demo-out

.PHONY: demo test check docs bench clean

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

# A real recording of a Xen host (samples/README.md) from file to finding to report.
demo: $(VENV)/.installed
	@mkdir -p $(OUT)
	$(BIN)/tracetool ingest --force samples/xen-2l-dom0-idle.xentrace -o $(OUT)/dataset
	$(BIN)/tracetool replay $(OUT)/dataset --policy current --policy proposed
	$(BIN)/tracetool report $(OUT)/dataset --policy current --policy proposed -o $(OUT)/report.html
	@echo "the report is $(CURDIR)/$(OUT)/report.html"

test: $(VENV)/.installed-test check
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed-bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test,bench]'
	@touch $@

# Instruction counts against bench/baseline.json (bench/README.md), machine instructions when valgrind is there, times.
bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench.guard $(shell command -v valgrind >/dev/null 2>&1 && echo --native)
	$(BIN)/python -m pytest bench/guard_speed.py --benchmark-group-by=group

docs: $(VENV)/.installed
	$(BIN)/python -m tracetool.reference docs/reference

clean:
	rm -rf $(VENV) $(OUT) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
