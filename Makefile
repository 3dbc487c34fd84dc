# make demo   train on MovieLens, checkpoint, serve, and show that both sides agree
# make test   the tests            make test-slow  the long ones, too
# make lint   ruff and pyright     make bench      lookup, against its peers
# make docs   the documentation's site, in build/site
# make sanitize   the kernel with AddressSanitizer and UndefinedBehaviorSanitizer, by itself and behind XLA
# make test-aarch64   the kernel's own tests on NEON: cross-compiled, run by an emulator
# make test-avx512    the same on AVX-512: run by an emulator
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard jaxembed/native/* serve/native/*)
PYTEST := $(BIN)/python -m pytest
# pip is no good beside itself: under `make -j` one waits for the other.
ALONE := import fcntl, runpy; f = open("$(VENV)/.lock", "w"); fcntl.flock(f, 2); runpy.run_module("pip", {}, "__main__", True)
PIP := $(BIN)/python -c '$(ALONE)'
# A process has the tests of a file for as long as may be, and with them what these have compiled.
SPREAD := -n auto --dist worksteal

.PHONY: demo test test-slow lint docs bench sanitize test-aarch64 test-avx512 clean

demo: $(VENV)/.demo
	$(BIN)/python examples/movielens.py

# Programs of the tests are compiled in a hurry, but for those that TensorFlow's results are compared with: a quarter
# of the time is LLVM's. Slow tests, and all of another Python, are compiled as usual. A test that hangs ends its process and fails.
test: $(VENV)/.test
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) $(SPREAD) -m "not slow and not tpu" --timeout 900 --timeout-method thread

test-slow: $(VENV)/.test
	$(PYTEST) $(SPREAD) -m "not tpu"

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tools/typecheck.py --public

# The reader of docstrings wants the packages where they are installed to. Warnings are errors.
docs: $(VENV)/.docs
	rm -rf build/api && mkdir -p build/api
	cp -r jaxembed build/api/ && cp -r train serve build/api/jaxembed/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The tests of Python load the instrumented libraries in place of the installed ones. Python itself is not
# instrumented: the sanitizer's library must come first, with the C++ one whose exceptions it watches.
SANITIZED := build/sanitize
CXX ?= c++
$(SANITIZED)/.built: $(VENV)/.installed $(SOURCES) tests/native/kernel_test.cc
	cmake -S . -B $(SANITIZED) -DCMAKE_BUILD_TYPE=None "-DPython_EXECUTABLE=$$(cd "$(BIN)" && pwd)/python" \
	  -DJAXEMBED_TESTS=ON -DJAXEMBED_SANITIZE=ON
	env -u MAKEFLAGS cmake --build $(SANITIZED) --parallel
	cmake --install $(SANITIZED) --prefix $(SANITIZED)/install
	@touch $@

sanitize: $(VENV)/.test $(SANITIZED)/.built
	$(SANITIZED)/kernel_test
	PYTHONPATH=$(SANITIZED)/install ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc JAXEMBED_SANITIZED=1 \
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  $(PYTEST) $(SPREAD) tests/test_native.py tests/test_optimizers_native.py tests/serve/test_native_packing.py \
	  tests/serve/test_native_merging.py tests/serve/server/test_native_reader.py

# Needs Debian's g++-aarch64-linux-gnu and qemu-user, and neither XLA nor Python.
AARCH64 := build/aarch64
NATIVE := jaxembed/native
CROSS := aarch64-linux-gnu-g++ -std=c++17 -O2 -Wall -Wextra -Wno-psabi -I$(NATIVE)
test-aarch64:
	mkdir -p $(AARCH64)
	$(CROSS) -O3 -DJAXEMBED_ISA=baseline -c $(NATIVE)/run_task.cc -o $(AARCH64)/run_task.o
	$(CROSS) -static tests/native/kernel_test.cc $(NATIVE)/select.cc $(NATIVE)/place.cc $(AARCH64)/run_task.o \
	  -o $(AARCH64)/kernel_test
	qemu-aarch64 $(AARCH64)/kernel_test

# Needs what the script names: packages of Debian's, and root.
test-avx512:
	tests/native/run_avx512

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/lookup.py

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "jaxembed needs Python 3.11 or newer; name one with make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "install Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@touch $@

# Built with the packages of .venv, whose paths stay: what was compiled before is not compiled again.
# What is installed already satisfies `jaxembed[...]`, which then adds its extra alone.
BUILD_REQUIRES := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])
$(VENV)/.installed: $(VENV)/.python $(SOURCES)
	$(PIP) install -q $$($(BIN)/python -c '$(BUILD_REQUIRES)')
	$(PIP) install -q cmake ninja || echo "CMake and ninja cannot be installed: the system's are used"
	$(PIP) install -q --no-build-isolation -e .
	@touch $@

$(VENV)/.demo: $(VENV)/.installed
	$(PIP) install -q 'jaxembed[demo]'
	@touch $@

# TensorFlow is the oracle of the parity tests; they are skipped where it cannot be installed.
$(VENV)/.test: $(VENV)/.installed
	$(PIP) install -q 'jaxembed[test]'
	$(PIP) install -q 'jaxembed[test,parity]' || echo "TensorFlow cannot be installed: no parity tests"
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	$(PIP) install -q 'jaxembed[lint]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install -q 'jaxembed[docs]'
	@touch $@

$(VENV)/.bench: $(VENV)/.demo
	$(PIP) install -q 'jaxembed[bench]' || echo "some peers cannot be installed: they are left out"
	@touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
