# Every target sets itself up: .venv once, then an in-place build whenever the sources changed. Environment variables of
# setup.py (IWSGD_CUDA, TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX ...) pass through.
PYTHON ?= python3
TORCH ?=
ARGS ?=

# Relative, and environment variables where a path is absolute: make cannot take spaces in the names of files.
VENV := .venv
PY := $(VENV)/bin/python
CMAKE_BUILD := build/cmake
SETUP := PATH="$$PATH_OUTSIDE" '$(PYTHON)' tools/setup_env.py $(if $(TORCH),--torch '$(TORCH)')
JOBS := $(or $(MAX_JOBS),$(shell getconf _NPROCESSORS_ONLN))
# make has a CXX of its own where nobody chose one
COMPILERS := $(if $(filter default undefined,$(origin CXX)),c++ g++ clang++,$(firstword $(CXX)))
# torch's build looks for the program ninja on the PATH; set-up must not: there python3 is the interpreter that .venv is made from
export PATH_OUTSIDE := $(PATH)
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Tests run in as many processes as there are cores, of one thread each, where pytest-xdist is there.
PYTEST = $(PY) -m pytest $$($(PY) -c 'import xdist' 2> /dev/null && printf %s '-n auto --dist loadgroup')
# examples/ and bench/ import the package from the checkout
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

NATIVE_SOURCES := $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/* csrc/python/*)
FORMATTED := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE_SOURCES) $(wildcard csrc/test/* tools/*.cu))

.DEFAULT_GOAL := help
.PHONY: help setup build demo demo-short test test-machine-code test-fast test-models ctest bench gpu gpu-first gpu-second lint format clean distclean FORCE
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-17s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo 'ARGS="..."        further arguments of the program that the target runs: make demo-short ARGS="--help"'
	@echo 'PYTHON=python3.12 the interpreter that .venv is made from; its torch is used if it has one (2.11 or later)'
	@echo 'TORCH=torch==...  what is fetched otherwise (default: TORCH in tools/setup_env.py)'
	@echo 'IWSGD_CUDA=1|0    build the CUDA kernels, or do not (default: where torch has CUDA and nvcc is found)'

$(VENV)/.ready: tools/setup_env.py pyproject.toml
	@$(SETUP)
	@touch $@

setup:  ## make or complete .venv, also where it is up to date
	@$(SETUP)
	@touch $(VENV)/.ready

# Holds the settings of the last build, and changes only when they do.
$(VENV)/.settings: FORCE $(VENV)/.ready
	@settings="$$IWSGD_CUDA $$IWSGD_NATIVE $$TORCH_CUDA_ARCH_LIST $$CUDA_HOME $(COMPILERS)"; \
	echo "$$settings" | cmp -s - $@ || echo "$$settings" > $@

$(VENV)/.built: $(VENV)/.ready $(VENV)/.settings setup.py $(NATIVE_SOURCES)
	@echo 'build: compiling the kernels in place (log: build/build.log)'
	@mkdir -p build
	@$(PY) setup.py build_ext --inplace --force > build/build.log 2>&1 || { cat build/build.log; exit 1; }
	@grep '^iwsgd_ext:' build/build.log || true
	@touch $@

build: $(VENV)/.built  ## compile the kernels into iwsgd_ext/ (does nothing where nothing changed)

demo: $(VENV)/.built  ## train on handwritten digits with several noise samples per example
	$(PY) examples/digits.py $(ARGS)

demo-short: $(VENV)/.built  ## the same, small
	$(PY) examples/digits.py --quick $(ARGS)

test: $(VENV)/.built  ## the tests in Python and in C++, without those of test-machine-code
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not machine_code' $(ARGS)
	@if ! command -v cmake > /dev/null; then echo 'C++ tests left out: there is no cmake'; \
	elif ! { $(foreach compiler,$(COMPILERS),command -v $(compiler) ||) false; } > /dev/null; then \
	  echo 'C++ tests left out: there is no C++ compiler ($(COMPILERS))'; \
	else $(MAKE) --no-print-directory ctest; fi

test-machine-code: $(VENV)/.built  ## compile the GPU kernels for each architecture and read what comes out; plant faults in them
	OMP_NUM_THREADS=1 $(PYTEST) -m machine_code $(ARGS)

test-fast: $(VENV)/.built  ## the Python tests without the slow ones, and without the reference backend where kernels are built
	OMP_NUM_THREADS=1 $(PYTEST) -m 'not slow' $(if $(wildcard iwsgd_ext/_ops*),-k 'not cpu-reference') $(ARGS)

test-models: $(VENV)/.built  ## converted models of timm and transformers, fetched into build/ where they are not installed
	@$(PY) tools/test_models.py $(ARGS)

ctest: $(VENV)/.ready  ## the C++ tests, built with CMake
	@mkdir -p build
	@cmake -S . -B $(CMAKE_BUILD) -DPython_EXECUTABLE="$$PWD/$(PY)" -DIWSGD_CUDA=$(or $(IWSGD_CUDA),AUTO) > build/cmake.log 2>&1 || { cat build/cmake.log; exit 1; }
	@echo 'ctest: compiling (log: build/cmake.log)'
	@MAKEFLAGS= cmake --build $(CMAKE_BUILD) --parallel $(JOBS) >> build/cmake.log 2>&1 || { cat build/cmake.log; exit 1; }
	cd $(CMAKE_BUILD) && ctest --output-on-failure

bench: $(VENV)/.built  ## measure ops, layers and training steps beside plain PyTorch (ARGS=--quick: under 2 minutes)
	$(PY) -m bench $(ARGS)

# No .venv is made: the Python with torch is used as it is, which asks for no network and no package. OUT= is where the report goes.
GPU = '$(PYTHON)' tools/gpu.py $(1) $(if $(OUT),--out '$(OUT)') $(ARGS)

gpu:  ## build for this machine's GPU, run every check on it, measure (OUT=dir for the report, PYTHON= the Python with torch)
	$(call GPU,full)

gpu-first:  ## check new kernels on a GPU, in 210 seconds: build, exercise, timing, counters, sanitizers
	$(call GPU,first)

gpu-second:  ## then, in 240 seconds: build, exercise, timing, the tests of the CUDA kernels
	$(call GPU,second)

# The versions that pyproject.toml names in its extra "lint". When that file changes they are looked at again.
$(VENV)/.lint: $(VENV)/.ready
	@$(SETUP) lint
	@touch $@

# Through Python, which also finds a package that .venv sees in the outer interpreter; the program would not be on the PATH.
CLANG_FORMAT = $(PY) -c 'from clang_format import clang_format; clang_format()'

lint: $(VENV)/.lint  ## check format and types of the sources (make format corrects the format)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@echo 'clang-format --dry-run -Werror, of $(words $(FORMATTED)) files'
	@$(CLANG_FORMAT) --dry-run -Werror $(FORMATTED)
	$(PY) -m mypy
	$(PY) -m mypy --strict tests/public_names.py

format: $(VENV)/.lint  ## format the sources by ruff and clang-format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@echo 'clang-format -i, of $(words $(FORMATTED)) files'
	@$(CLANG_FORMAT) -i $(FORMATTED)

clean:  ## remove what was built
	rm -rf build dist *.egg-info iwsgd_ext/*.so .pytest_cache .hypothesis .ruff_cache $(VENV)/.built
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean  ## remove what was built, and .venv
	rm -rf .venv
