# make demo: from a fresh clone to a trained joint model of pictures and captions, and what it made.   make test: the whole suite.   make lint: style.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/demo
# accelerate gives each process one CPU thread unless it is told otherwise
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
FLOW := {"kind": "flow", "training": {"steps": 400}}
TEXT_FLOW := {"kind": "flow", "training": {"steps": 800}}
DEMO := recipes/joint_vae.py --output_dir $(OUT) --num_epochs 3 --importance_samples 0 \
	--densities '{"shared": {"kind": "mixture", "num_components": 60}, "private": $(FLOW), "shared_given_text": $(TEXT_FLOW)}'

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(LAUNCH) $(DEMO)
	@echo; echo "model folder: $(OUT)   model card: $(OUT)/README.md   pictures from captions, captions from pictures, and both from nothing:"
	@find $(OUT)/figures -name '*.png' | sort | sed 's/^/  /'

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OUT)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# A stamp is newer than pyproject.toml when what it stands for is installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@
