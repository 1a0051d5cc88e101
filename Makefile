# make run: train the embedded default.  make test: the quick ones; CI runs all.  make docs: the site.  All set up .venv first, once.
# JOBS: test files at a time, 0 for one and no other process; one with Ray in it takes 4 GB. Three keep two cores busy.
PYTHON ?= python3
JOBS ?= 3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(if $(filter 3.%,$(PYTHON)),--python-version $(PYTHON))

.PHONY: setup run wheel wheelhouse test lint docs clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@echo "installing into $(VENV): 6 GB, a few minutes"
	$(if $(VERSION),python3,$(PYTHON)) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	# hpsv2 pins protobuf<4 and pytest==7.2.0, which would hold everything else back; it needs neither.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps hpsv2==1.2.0 clint args
	touch $@

run: setup
	$(BIN)/python -m g2rpo_ray.run $(ARGS)

wheel: setup
	$(BIN)/pip wheel --quiet --no-deps -w dist .

# All wheels for a machine without network, of another Python, too: make wheelhouse PYTHON=3.12. There, with that Python:
#   pip install --no-index --find-links wheelhouse g2rpo_ray
#   pip install --no-index --no-deps --find-links wheelhouse hpsv2 clint args
wheelhouse: setup
	$(BIN)/pip wheel --quiet --no-deps -w wheelhouse . 'deepspeed>=0.19,<0.20' hpsv2==1.2.0 clint args
	$(BIN)/pip download --quiet --only-binary=:all: $(VERSION) -d wheelhouse \
		--find-links wheelhouse g2rpo_ray

test: setup
	tests/isolated $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages of docs/ as a site, in build/site. A link that leads nowhere is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet -f docs/site/mkdocs.yml

clean:
	rm -rf $(VENV)
