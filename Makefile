# Every target uses the virtual environment .venv, which is created on first use and updated when a source file changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# By default, pip would byte-compile all 18,000 Python files, which takes a minute. With --no-compile, Python compiles
# each file when it is first imported.
INSTALL := $(PIP) install --quiet --no-compile
COMMA := ,
EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
# On Linux, MLX's backend is an extra; on macOS it is part of MLX.
CPU := $(if $(filter Darwin,$(shell uname -s)),,cpu)
# With PEERS=1, torch and PEFT, which are large, are installed too, and the tests that compare with them are run.
PEERS ?=
PEER_EXTRA := $(if $(filter-out 0,$(PEERS)),peers)
TOOLS := $(VENV)/tools$(if $(PEER_EXTRA),-and-peers)
# The tests of a file share servers and trained models, so they all run in one process. Slow files start first
# (conftest.py). Since tests also wait for servers and jobs, there is one process more than there are cores, up to four.
# OMP_NUM_THREADS limits torch to one thread per process.
PROCESSES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4)))
IN_PARALLEL := -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
test check: export OMP_NUM_THREADS := 1
# The argument of `pip install` that names the built wheel and the given extras.
package = "$$(echo $(VENV)/wheel/*.whl)$(if $(strip $(1)),[$(subst $(SPACE),$(COMMA),$(strip $(1)))])"
MLX_AND_NANOBIND = $(shell sed -nE 's/^ *"((mlx|mlx-cpu|nanobind)==[0-9.]+).*/\1/p' pyproject.toml | sort -u)
RELEASE_TOOLS = $(shell sed -nE '/^release = /,/^\]/ s/^ *"([a-z-]+>=[0-9.]+).*/\1/p' pyproject.toml)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h')
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE \
  $(shell find csrc python licenses -type f -not -name '*.so' -not -name '*.pyi' -not -path '*/__pycache__/*')

.DEFAULT_GOAL := help
.PHONY: help demo check test lint mac docs bench models dev wheel release-check clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/installed ## Train a small model on this machine and show what it learned
	$(BIN)/mlx-segtrain demo

# After `make dev`, changes to Python files take effect without another build.
check: $(if $(wildcard $(VENV)/editable),,$(TOOLS)) ## Run the fast tests, in under 3 minutes
	$(BIN)/python -m pytest -q $(IN_PARALLEL) -m "not acceptance"

test: $(TOOLS) $(VENV)/browser ## Run all tests; with PEERS=1 also those that compare with torch
	$(BIN)/python -m pytest -q $(IN_PARALLEL)

lint: $(TOOLS) ## Check formatting, style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	@cp $(VENV)/lib/python*/site-packages/mlx_segtrain/_core.pyi python/mlx_segtrain/
	$(BIN)/pyright --pythonpath $(BIN)/python

mac: $(VENV)/for_mac ## Compile everything for macOS on Linux, and check that planted faults are found
	cd tests && ../$(BIN)/python -m mac

docs: $(TOOLS) ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(TOOLS) ## Time attention, and training steps next to other trainers that are installed
	$(BIN)/python bench/ops.py
	$(BIN)/python bench/step.py

models: $(TOOLS) ## Update the table in docs/models.md
	$(BIN)/python tests/model_table.py

dev: $(VENV)/made ## Install in editable mode; run it again after C++ edits
	$(INSTALL) --editable '.[$(subst $(SPACE),$(COMMA),$(strip $(CPU) dev $(PEER_EXTRA)))]'
	@touch $(VENV)/editable $(VENV)/built $(VENV)/installed $(sort $(VENV)/tools $(TOOLS))

wheel: $(VENV)/made ## Build a wheel into dist/
	$(PIP) wheel --quiet --no-deps --wheel-dir dist .

# Files that are already in dist/ are checked without another build.
release-check: $(VENV)/release $(if $(wildcard dist/*),,wheel) ## Check the wheels and the sdist in dist/
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(if $(filter Linux,$(shell uname -s)),for wheel in dist/*linux*.whl; do $(BIN)/auditwheel show $$wheel; done)
	$(BIN)/python tests/release_check.py dist/*

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

$(VENV)/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "'$(PYTHON)' is not Python 3.10 or newer: specify one, as in make demo PYTHON=python3.12" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The package is built once for all sets of extras. --force-reinstall is needed because the version has not changed.
$(VENV)/built: $(VENV)/made $(SOURCES)
	@echo "Building the package (a few minutes the first time)"
	@rm -rf $(VENV)/wheel $(VENV)/editable
	$(PIP) wheel --quiet --no-deps --wheel-dir $(VENV)/wheel .
	$(INSTALL) --no-deps --force-reinstall $(call package)
	@touch $@

$(VENV)/installed: $(VENV)/built
	@echo "Installing dependencies into $(VENV)"
	$(INSTALL) $(call package,$(CPU))
	@touch $@

$(TOOLS): $(VENV)/built
	@echo "Installing dependencies into $(VENV), with tools$(if $(PEER_EXTRA), and peers)"
	$(INSTALL) $(call package,$(CPU) dev $(PEER_EXTRA))
	@touch $(VENV)/installed $(sort $(VENV)/tools $(TOOLS))

# Installs compilers for macOS and for the Metal kernels, and the packages that generate the text of the kernels. The
# package itself is not built.
$(VENV)/for_mac: $(VENV)/made tests/mac/requirements.txt pyproject.toml
	@echo "Installing compilers for macOS into $(VENV)"
	$(INSTALL) -r tests/mac/requirements.txt $(MLX_AND_NANOBIND)
	@touch $@

$(VENV)/release: $(VENV)/made pyproject.toml
	@echo "Installing release tools into $(VENV)"
	$(PIP) install --quiet $(foreach tool,$(RELEASE_TOOLS),'$(tool)')
	@touch $@

# The tests of the page need a browser. If there is none, Debian's chromium is installed, which requires root.
$(VENV)/browser: $(VENV)/made
	@for name in chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exec touch $@; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing chromium" && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium \
	    fonts-dejavu-core >/dev/null && touch $@; \
	else echo "No chromium: the tests of the page will be skipped (install it to run them)"; fi
