# Everything a developer or a first-time user types. Each target says what it does as it goes.
# `make` alone lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH_VERSION := 2.13.0
MAX_JOBS ?= $(shell nproc)
export MAX_JOBS
# Builds must use the torch that is installed, not one that pip downloads for the build alone.
PIP := $(BIN)/python -m pip --disable-pip-version-check

# git's patterns reach into folders. Files that are not added yet are checked, too.
CXX_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' \
  'kernels/*.h' 'kernels/*.hip' 'benchmarks/*.hip' 'tests/*.c' 'tests/*.cpp')
TORCH_FREE = kernels csrc/error.h csrc/cpu/kernels* csrc/cpu/quantizers* csrc/cpu/simd.h \
  csrc/gpu/dispatch.h csrc/gpu/driver.* csrc/gpu/plans.* csrc/gpu/runtime.*

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The environment is made anew when the requirements change. A torch that is there already is kept,
# so that a ROCm or CUDA build installed by hand beforehand is the one that is used. Python compiles
# the few modules that it imports; to compile all of them takes a minute.
$(VENV)/ready: requirements-dev.txt
	@echo "==> $(VENV): Python packages"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet --no-compile torch==$(TORCH_VERSION)
	$(PIP) install --quiet --no-compile -r requirements-dev.txt
	@$(BIN)/python -c 'import torch; print("==> torch", torch.__version__)'
	@touch $@

.PHONY: build
build: $(VENV)/ready ## build the library in place, into .venv
	@echo "==> build: torch_q4"
	$(PIP) install --quiet --no-build-isolation --no-deps --editable .

.PHONY: demo
demo: build ## generate text with a real 270M model whose weights stay packed
	@echo "==> demo: examples/generate.py"
	$(BIN)/python examples/generate.py

# Processes share the cores: a thread that waits in a loop takes the time of another.
SHARED = OMP_WAIT_POLICY=passive $(BIN)/python

.PHONY: test
test: build ## run the whole test suite
	@echo "==> test: pytest"
	$(SHARED) -m pytest --numprocesses $(MAX_JOBS) --dist loadgroup

# On a machine with a GPU that torch can use; several processes share it.
.PHONY: test-gpu
test-gpu: build ## run the tests on the GPU
	@echo "==> test-gpu: pytest -m gpu"
	$(BIN)/python -m pytest -m gpu --numprocesses 8 tests/gpu

# The kernels alone, without torch: TORCH_Q4_DRIVER names libamdhip64.so or libcuda.so.1.
.PHONY: test-device
test-device: $(VENV)/ready ## run the GPU kernels without torch, through the driver
	@echo "==> test-device: tests/device/run.py"
	$(BIN)/python tests/device/run.py

# HIP's compiler gets a small Debian of its own, of 1 GB; Debian 12 has none that is new enough.
HIP_ROOT ?= build/hip-root
ROCM_CHECK ?=
.PHONY: rocm-check
rocm-check: ## compile the kernels for every AMD GPU and check the code; needs root, no GPU
	@echo "==> rocm-check: ci/rocm_check.py"
	ci/hip_root.sh $(HIP_ROOT)
	$(PYTHON) ci/rocm_check.py --hip-root $(HIP_ROOT) --jobs $(MAX_JOBS) $(ROCM_CHECK)

# The sources of the GPU kernels as C++ for this CPU; the compiler is that of HIP's root.
EMULATE ?=
.PHONY: emulate
emulate: $(VENV)/ready ## run the GPU kernels on this CPU; needs root for HIP's compiler, no GPU
	@echo "==> emulate: tests/device/emulate.py"
	ci/hip_root.sh $(HIP_ROOT)
	$(BIN)/python tests/device/emulate.py --hip-root $(HIP_ROOT) --jobs $(MAX_JOBS) $(EMULATE)

.PHONY: fuzz
fuzz: build ## run the long forms of the fuzzers; takes an hour on two cores
	@echo "==> fuzz: pytest -m fuzz"
	$(SHARED) -m pytest -m fuzz --numprocesses $(MAX_JOBS) tests/fuzz

# A build with a sanitizer: the whole library, and what tests/cpp has for it.
SANITIZED = $(BIN)/cmake -S . -B build/$(1) -DTORCH_Q4_SANITIZE=$(1) -DTORCH_Q4_GPU=off \
  -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(CURDIR)/build/$(1)/torch_q4 \
  $$($(BIN)/python -c 'import os, torch; d = os.path.dirname(torch.__file__); \
    print(f"-DTORCH_INCLUDE_DIR={d}/include -DTORCH_LIBRARY_DIR={d}/lib")') && \
  $(BIN)/cmake --build build/$(1) --parallel $(MAX_JOBS)

# The kernels without torch, on every instruction set and on buffers without a byte to spare. Then
# the library in Python: every operator, the checks of its arguments, and the readers.
.PHONY: sanitize
sanitize: $(VENV)/ready ## run the library under AddressSanitizer and UBSan
	@echo "==> sanitize: tests/cpp"
	$(call SANITIZED,address)
	$(BIN)/python tests/cpp/run.py build/address/test_kernels
	@echo "==> sanitize: the library in Python"
	$(SHARED) ci/sanitize.py build/address pytest -m "not slow" \
	  --numprocesses $(MAX_JOBS) $(SANITIZED_TESTS)
SANITIZED_TESTS := tests/test_embedding.py tests/test_errors.py tests/test_formats.py \
  tests/test_linear.py tests/test_pack.py tests/test_quantize.py \
  tests/fuzz/test_fuzzers.py::test_operators \
  tests/fuzz/test_fuzzers.py::test_operators_without_tensors \
  tests/fuzz/test_fuzzers.py::test_readers

.PHONY: sanitize-threads
sanitize-threads: $(VENV)/ready ## run the operators on several threads under ThreadSanitizer
	@echo "==> sanitize-threads: tests/cpp/threads.py"
	$(call SANITIZED,thread)
	$(BIN)/python ci/sanitize.py build/thread tests/cpp/threads.py

.PHONY: lint
lint: $(VENV)/ready ## check formatting, style and types
	@echo "==> lint: ruff, mypy, clang-format"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	@! grep -rnE '#include *[<"](torch|ATen|c10)/' $(TORCH_FREE) \
	  || { echo 'lint: no torch header belongs into $(TORCH_FREE)'; exit 1; }

.PHONY: format
format: $(VENV)/ready ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

.PHONY: bench
bench: build ## time linear against F.linear, and ggml where llama-cpp-python is installed
	$(BIN)/python benchmarks/bench_cpu.py --short

.PHONY: bench-gpu
bench-gpu: build ## time linear on the GPU against F.linear and against reading the weight
	$(BIN)/python benchmarks/bench_gpu.py --short

.PHONY: wheel
wheel: $(VENV)/ready ## build dist/*.whl, one wheel for every torch and Python
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

.PHONY: clean
clean: ## remove what builds made; .venv stays
	rm -rf build dist *.egg-info torch_q4/_C.so
