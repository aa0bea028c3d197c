# make demo: from a fresh clone to two trained models and their pictures.   make test: the whole suite.   make lint: style.
# Another interpreter: make demo PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/demo
# accelerate gives each process one CPU thread unless it is told otherwise
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
DEMO_TEXT := recipes/text_vae.py --output_dir $(OUT)/text --num_epochs 4 --importance_samples 20
DEMO_IMAGE := recipes/image_vae.py --output_dir $(OUT)/image --num_epochs 2 --importance_samples 0

.PHONY: demo test lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(LAUNCH) $(DEMO_TEXT)
	$(LAUNCH) $(DEMO_IMAGE)
	@for run in text image; do \
		echo; echo "$$run: model folder $(OUT)/$$run, model card $(OUT)/$$run/README.md"; \
		find $(OUT)/$$run -maxdepth 2 \( -path '*/figures/*' -o -name metrics.json \) | sort | sed 's/^/  /'; \
	done
	@echo; echo "Reconstructions, samples and interpolations are the figures above; sentences are in $(OUT)/text/README.md."

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q

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
