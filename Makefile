# `make demo` and `make test` each do everything on a fresh machine; the second time set-up costs nothing.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUNTIME := $(VENV)/.installed-runtime
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo test test-long lint build clean
setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP) $(RUNTIME)

# What runs needs none of the tools that test it.
$(RUNTIME): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[video,train]"
	touch $(RUNTIME)

demo: $(RUNTIME)
	$(VENV)/bin/adaptive-fusion demo

test: lint
	$(VENV)/bin/python -m pytest -q -n 2 --dist worksteal

# What takes long by nature: thousands of mutants, many processes, other programs. ADAPTIVE_FUSION_LONG_SHARE=0.1 does a
# tenth of each count.
test-long: setup
	$(VENV)/bin/python -m pytest -q tests/long

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

build: setup
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .

clean:
	rm -rf $(VENV) dist .mypy_cache .ruff_cache .pytest_cache
