# make demo [BACKEND=torch|mindspore]   install, fetch a real model, fine-tune it, show what it learned
# make model                            the model alone, as models/SmolLM2-135M-Instruct
# make test                             install and run the default suite
# make test-slow, make test-families, make test-faults, make test-netns, make test-mindformers, make test-deepspeed  the suites that take longer
# make bench DATA=alpaca.json [QUESTIONS="startup conversion"]   measure against other toolkits
# make lint

SHELL := /bin/bash
PYTHON ?= python3
BACKEND ?= both
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct

ENGINES_both := torch,mindspore
ENGINES_torch := torch
ENGINES_mindspore := mindspore
ENGINES := $(ENGINES_$(BACKEND))
ifeq ($(ENGINES),)
$(error BACKEND must be torch, mindspore or both, not '$(BACKEND)')
endif

# Two pip installations at a time would spoil the environment.
.NOTPARALLEL:
.PHONY: demo model test test-slow test-families test-faults test-netns test-mindformers test-deepspeed bench lint clean

demo: $(VENV)/installed-$(BACKEND) $(MODEL)/config.json
	$(BIN)/python scripts/demo.py --model $(MODEL) --engines $(ENGINES)

model: $(MODEL)/config.json

$(MODEL)/config.json: | $(VENV)/installed-model
	$(BIN)/python scripts/fetch_model.py --output_path $(MODEL)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

test-families: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m families

test-faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m faults

# As root: it makes network namespaces, and removes them.
test-netns: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 0 -m netns

test-mindformers: $(VENV)/installed-dev
	PYTHON=$(abspath $(BIN)/python) bash scripts/test_mindformers.sh

# DeepSpeed compiles its messages between processes of a machine once, for some minutes.
test-deepspeed: $(VENV)/installed-deepspeed
	DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(VENV)/torch_extensions) PATH="$(abspath $(BIN)):$$PATH" \
	  $(BIN)/python -m pytest -n 0 -m deepspeed

bench: $(VENV)/installed-dev $(MODEL)/config.json
	$(BIN)/python -m benchmarks.run $(QUESTIONS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .

# Each set of extras is installed once, and again when the pins or the extras change.
$(VENV)/installed-both $(VENV)/installed-torch $(VENV)/installed-mindspore: EXTRAS = $(ENGINES),demo
$(VENV)/installed-model: EXTRAS = demo
$(VENV)/installed-dev: EXTRAS = torch,mindspore,demo,dev
$(VENV)/installed-deepspeed: EXTRAS = torch,mindspore,deepspeed,demo,dev
$(VENV)/installed-%: constraints.txt setup.cfg | $(VENV)/bin/python
	$(BIN)/python -m pip install --upgrade 'pip>=25'
	$(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) output build *.egg-info
