# Two commands on a machine that has only Python 3 and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# Four tests in ten, 40 seconds of one core: what needs neither a fit, a long attack, a compiler nor another process.
FAST := tests/test_layering.py tests/risk tests/utils tests/metrics tests/simulation tests/attacks/closed_form

.PHONY: check coverage demo test lint types unit docs bench clean

$(VENV)/demo.installed: pyproject.toml
	@echo "Installing PyTorch, Lightning and what the demo draws with into $(VENV): on Linux 2.5 GB to fetch, 6 GB on disk"
	@echo "(most of it CUDA libraries that torch's wheels bring along), 1 to 3 minutes from a quick package index."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@
	@echo "Installed. The demo takes about a minute; the first recovered face shows within 20 seconds."

$(VENV)/dev.installed: pyproject.toml
	@echo "Installing the package with all extras and the tools of its developers into $(VENV): 3 to 5 minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ $(VENV)/demo.installed
	@echo "Installed."

demo: $(VENV)/demo.installed
	$(BIN)/gradaudit demo --out gradaudit-demo

test: lint types unit

# One turn of the loop: lint, types and the fast tests, within a minute on two cores.
check: lint types
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not slow' $(FAST)

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.installed
	$(BIN)/mypy

unit: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu'

coverage: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu' --cov --cov-report=term-missing:skip-covered

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
