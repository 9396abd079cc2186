# Two commands on a machine that has only Python 3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types unit docs bench clean

$(VENV)/demo.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $@

$(VENV)/dev.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ $(VENV)/demo.installed

demo: $(VENV)/demo.installed
	$(BIN)/gradaudit demo --out gradaudit-demo

test: lint types unit

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.installed
	$(BIN)/mypy

unit: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu and not alone'
	$(BIN)/python -m pytest -m alone

docs: $(VENV)/dev.installed
	$(BIN)/python -m mkdocs build --strict

bench: $(VENV)/dev.installed
	$(BIN)/python -m benchmarks.cost.overhead
	$(BIN)/python -m benchmarks.cost.evaluation --threads 1
	$(BIN)/python -m benchmarks.quality.quality_over_time --threads 1
	$(BIN)/python -m benchmarks.cost.scaling --threads 1
	$(BIN)/python -m benchmarks.cost.memory --threads 1
	$(BIN)/python -m benchmarks.quality.recovery

clean:
	rm -rf $(VENV) gradaudit-demo site build dist *.egg-info
