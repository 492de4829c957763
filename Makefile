# make train   installs into .venv, trains for about two minutes, saves a loss curve and prints a sample
# make test    installs into .venv, runs the quick tests
# make lint    ruff and mypy
# make wheels  builds a wheel for each system in dist/, with the compiled kernels; PLATFORMS=win_amd64 selects one
# make docs    runs the tour and builds the site in build/site
# make bench   repeats the measurements of docs/guides/benchmarks.md on this machine
# The first supported one is used; `make PYTHON=...` selects another.
PYTHON ?= python3.14 python3.13 python3.12 python3.11 python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PLATFORMS ?= manylinux_2_28_x86_64 manylinux_2_28_aarch64 win_amd64 macosx_14_0_arm64

.PHONY: train test lint wheels docs bench clean

train: $(VENV)/.train
	$(BIN)/rwkv-train experiment=quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# setuptools keeps the files of the previous wheel in build/lib.
wheels: $(VENV)/.dev
	for platform in $(PLATFORMS); do \
	    $(BIN)/python -m rwkv_pl.ops.prebuilt $$platform && rm -rf build/lib build/bdist.* && \
	    $(BIN)/python -m build --wheel --no-isolation -C--build-option=--plat-name=$$platform || exit; \
	done
	rm -rf src/rwkv_pl/prebuilt build

docs: $(VENV)/.dev
	$(BIN)/python -m docs
	$(BIN)/sphinx-build -q -W --keep-going docs build/site

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks all

# Exits with the reason if a Python is not supported.
SERVES := import sys, importlib.util as u; v = sys.version_info[:2]; \
    sys.exit("is %d.%d" % v if not (3, 11) <= v <= (3, 14) else None if u.find_spec("ensurepip") else "has no venv")

$(VENV)/.train: pyproject.toml constraints.txt
	@test -x $(BIN)/pip && $(BIN)/python -c '$(SERVES)' 2>/dev/null && exit; \
	for python in $(PYTHON); do \
	    command -v $$python >/dev/null || continue; \
	    if why=$$($$python -c '$(SERVES)' 2>&1); then \
	        echo $$python -m venv $(VENV); \
	        $$python -m venv --clear $(VENV) && exit; \
	        rm -rf $(VENV); exit 1; \
	    fi; \
	    seen="$$seen$$python $$why, "; \
	done; \
	echo "make: found" $${seen:-none of $(PYTHON),} "but a Python from 3.11 to 3.14 with venv is needed: install one" \
	    "(https://www.python.org/downloads, brew install python, apt install python3-venv)," \
	    "or name it: make PYTHON=/path/to/python3" >&2; exit 1
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
