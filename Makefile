# `make demo` and `make test` do all the set-up: a virtual environment with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# torch goes first and alone: a plain `pip install` would fetch a build with CUDA libraries.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo docs test quick lint clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e '.[test,docs]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/cryorecon demo -o demo --overwrite

# The pages of docs/ as a site in build/site; a broken link is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file examples/mypy.ini examples/benchmarks/*.py
	$(BIN)/mypy --config-file examples/mypy.ini examples/reproduce/*.py
	$(BIN)/lint-imports

# One process a core with one thread each: many small tests gain more than from two threads.
quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadscope -m 'not slow'

test: quick docs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadscope -m slow

clean:
	rm -rf $(VENV) demo build dist
