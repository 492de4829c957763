# make train   installs into .venv, trains for about a minute, shows the curve and a sample
# make test    installs into .venv, runs the tests
# make lint    ruff and mypy
# make wheel   a wheel for this platform, with the kernels built, in dist/
# make bench   what the README claims, measured here
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: train test lint wheel bench clean

train: $(VENV)/.train
	$(BIN)/rwkv-train experiment=quickstart

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.dev
	$(BIN)/python -m rwkv_pl.ops.prebuilt
	$(BIN)/python -m build --wheel --no-isolation
	rm -rf src/rwkv_pl/prebuilt build

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks all

$(VENV)/.train: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.train
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
