# make run: train the embedded default.  make test: all tests.  Both set up .venv first, once.
# JOBS=2: two test files at a time, a quarter faster on two cores; one with Ray in it takes about a core and 4 GB.
PYTHON ?= python3
JOBS ?= 0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: setup run wheel test lint clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	# hpsv2 pins protobuf<4 and pytest==7.2.0, which would hold everything else back; it needs neither.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps hpsv2==1.2.0 clint args
	touch $@

run: setup
	$(BIN)/python -m g2rpo_ray.run $(ARGS)

wheel: setup
	$(BIN)/pip wheel --quiet --no-deps -w dist .

test: setup
	tests/isolated $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)
