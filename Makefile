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
TORCH_FREE = kernels csrc/error.h csrc/cpu/kernels* csrc/cpu/simd.h csrc/gpu/dispatch.h \
  csrc/gpu/driver.* csrc/gpu/plans.* csrc/gpu/runtime.*

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# The environment is made anew when the requirements change. A torch that is there already is kept,
# so that a ROCm or CUDA build installed by hand beforehand is the one that is used.
$(VENV)/ready: requirements-dev.txt
	@echo "==> $(VENV): Python packages"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install --quiet torch==$(TORCH_VERSION)
	$(PIP) install --quiet -r requirements-dev.txt
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

.PHONY: test
test: build ## run the whole test suite
	@echo "==> test: pytest"
	$(BIN)/python -m pytest

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
.PHONY: rocm-check
rocm-check: ## compile the kernels for every AMD GPU and check the code; needs root, no GPU
	@echo "==> rocm-check: ci/rocm_check.py"
	ci/hip_root.sh $(HIP_ROOT)
	$(PYTHON) ci/rocm_check.py --hip-root $(HIP_ROOT) --jobs $(MAX_JOBS)

# The kernels alone, without torch, under AddressSanitizer and UBSan.
.PHONY: sanitize
sanitize: $(VENV)/ready ## run the kernels' C++ tests under the sanitizers
	@echo "==> sanitize: tests/cpp"
	$(BIN)/cmake -S . -B build/sanitize -DTORCH_Q4_SANITIZE=ON -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/sanitize --parallel $(MAX_JOBS)
	$(BIN)/python tests/cpp/run.py build/sanitize/test_kernels

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
