# Every target does the set-up that it needs: Python 3.11, make and, on a CPU, a C++ compiler are enough to start with.

PYTHON ?= $(or $(shell command -v python3.11 2>/dev/null),python3)
# A GPU machine: make setup LOCK=cluster/locks/gpu.txt; later targets keep to the lock that .venv was made from.
LOCK ?= $(or $(shell cat .venv/lock 2>/dev/null),cluster/locks/cpu.txt)
# More for the command itself: make test ARGS="-k read", make demo ARGS="train.epochs=2"
ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
MODEL := .models/smollm2-135m-instruct
# Named after the lock's content, so that a changed lock makes a new .venv and nothing else does.
INSTALLED := .venv/.installed-$(shell cksum < $(LOCK) | tr ' ' '-')

.PHONY: help setup demo serve test test-long lint locks clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) $(MODEL)/model.safetensors ## .venv from the lock, and the embedded default model in .models

demo: setup ## teach the default model twelve passages, measure it, publish the adapter; last line: JSON
	@$(BIN)/python -m pipeline run benchmarks/demo/demo.toml $(ARGS)

serve: setup ## serve the demo's adapter, and any other of its registry, until Ctrl-C
	@$(BIN)/python -m serve benchmarks/demo/demo.toml $(ARGS)

test: setup ## run the tests
	$(BIN)/python -m pytest $(ARGS)

test-long: setup ## run the tests that take minutes, which `make test` leaves out: several raylets, kills of the endpoint
	$(BIN)/python -m pytest -m long $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove .venv, .models and caches; runs and registries stay
	rm -rf .venv .models .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, because its CPU build is not on PyPI: pip's own settings may know a place that has it,
# and if not, only this one package comes from PyTorch's index.
$(INSTALLED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
		echo 'This needs Python 3.11, and $(PYTHON) is: '"$$($(PYTHON) --version 2>&1)"; \
		echo 'Name yours: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.11'; exit 1; } >&2
	@echo 'Installing $(LOCK) into .venv, which takes some minutes' >&2
	@$(PYTHON) -m venv --clear .venv
	@torch=$$(grep '^torch==' $(LOCK)); $(PIP) install --no-deps "$$torch" 2> .venv/torch.log || case $$torch in \
		*+cpu) $(PIP) install --no-deps "$$torch" --index-url https://download.pytorch.org/whl/cpu ;; \
		*) cat .venv/torch.log >&2; exit 1 ;; \
	esac
	@$(PIP) install --no-deps -r $(LOCK)
	@echo $(LOCK) > .venv/lock
	@touch $@

$(MODEL)/model.safetensors: | $(INSTALLED)
	@$(BIN)/python -m pipeline.default_model $(MODEL)

# Pins that are there stay unless pyproject.toml rules them out; ARGS=--upgrade takes the newest. The CPU build of torch
# is looked for where pip is told to look for wheels, else in PyTorch's index.
COMPILE = $(BIN)/uv pip compile --quiet pyproject.toml --extra dev --no-annotate --custom-compile-command 'make locks' \
	--system-certs --python-version 3.11 --python-platform x86_64-unknown-linux-gnu $(ARGS)
locks: $(INSTALLED) ## pin every version again, for CPU and for GPU, after a change in pyproject.toml
	@links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null); \
		if [ -n "$$links" ]; then export UV_FIND_LINKS="$$links"; else export UV_TORCH_BACKEND=cpu; fi; \
		$(COMPILE) --extra cpu --overrides cluster/locks/overrides-cpu.txt --output-file cluster/locks/cpu.txt
	@$(COMPILE) --extra gpu --output-file cluster/locks/gpu.txt
