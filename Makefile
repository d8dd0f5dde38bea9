# From nothing but Python 3.11+ and make. Everything goes into .venv; a second call installs nothing.
#
#   make video            a video from a default prompt: out.mp4
#   make test             the quick tests       (PYTEST_ARGS="tests/unit" picks some)
#   make slow             the slow tests        (PART=2/6 runs the second of six parts)
#   make lint             ruff, mypy, import-linter
#   make bench-kernels    the kernels' benchmarks
#   make install          the engine alone, in .venv
#   make clean            away with .venv and build products
#
# A C++ compiler is used if there is one (csrc); without it, `sora doctor` says what is left out.
# TORCH_ARGS goes to the `pip install` of torch, to choose another index or build.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: video test slow lint bench-kernels install install-dev clean

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
TORCH_ARGS ?=
PYTEST_ARGS ?=
PART ?=
PROMPT ?= a red circle moves right on a white background
OUT ?= out.mp4

# Two processes take the test files in turn. A file stays in one, and the longest come first.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder

# The first of these that is Python 3.11 or newer.
PYTHONS := $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14 python
CSRC := $(shell find csrc -type f 2>/dev/null)

video: install
	@echo "Making $(OUT) with the bundled checkpoint: about 10 seconds"
	$(VENV)/bin/sora generate "$(PROMPT)" -o $(OUT) --seed 7

test: install-dev
	@echo "Running $(if $(PYTEST_ARGS),tests as PYTEST_ARGS says,the quick tests: 10 to 13 minutes on two cores)"
	$(RUN) -m pytest $(WORKERS) $(PYTEST_ARGS)

slow: install-dev
	@echo "Running $(if $(PART),part $(PART) of the slow tests: minutes to an hour,all slow tests: hours) on two cores"
	$(RUN) -m pytest $(if $(PART),--slow-part $(PART),-m slow) --durations=5 $(PYTEST_ARGS)

lint: install-dev
	@echo "Linting, formatting and types, then which room imports which: under a minute"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PYTHONPATH=.:kernels $(VENV)/bin/lint-imports --no-logo

bench-kernels: install-dev
	$(RUN) -m pytest benchmarks/kernels --benchmark-enable $(PYTEST_ARGS)

install: $(VENV)/.engine
install-dev: $(VENV)/.dev

$(VENV)/.python:
	@for python in $(PYTHONS); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    found="$$python"; break; \
	  fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "Python 3.11 or newer is needed; name it: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$found"; \
	"$$found" -m venv --clear $(VENV)
	@touch $@

# torch comes first and by itself, so that nothing else chooses its version.
$(VENV)/.torch: $(VENV)/.python constraints.txt
	@echo "Installing torch: minutes, the largest part of the set-up; a CPU build is enough"
	@$(PIP) $(TORCH_ARGS) torch
	@$(PIP) setuptools ninja
	@touch $@

# Without build isolation csrc is built against the torch that will load it.
$(VENV)/.engine: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(CSRC)
	@echo "Installing sora_engine: a minute or two"
	@$(PIP) --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py constraints.txt $(CSRC)
	@echo "Installing sora_engine and what its tests need: a few minutes"
	@$(PIP) --no-build-isolation -e '.[dev]'
	@touch $(VENV)/.engine $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/sora_kernels/_native*.so
