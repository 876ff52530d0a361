# Every target sets up what it needs: `make demo` and `make test` work from a clean clone.
# Needs Python 3.11 or newer with venv. Another interpreter: make PYTHON=python3.12 install

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.nvvl-installed

# Two test processes with one thread each beat one process with two threads on a 2-core machine.
TEST_WORKERS ?= 2

.PHONY: install browser demo test lint bench engines interop interop-vllm interop-edge wheel-test clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("nvvl needs Python 3.11 or newer, got " + sys.version.split()[0] + "; say: make PYTHON=/path/to/python3.12 install")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/nvvl demo

# Reports are opened in headless Chromium; without it those tests fail and say so.
browser:
	@if command -v chromium >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	else \
		echo "chromium is missing and is not installed without root; say: sudo apt-get install chromium fonts-dejavu-core" >&2; \
	fi

test: install browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_WORKERS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	VENV=$(VENV) tools/check_types.sh
	$(BIN)/codespell

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/kernels.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/forward.py

# TensorRT-RTX engines of the embedded model, and of one full-size block of each kind, in each format.
engines: install
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py --size embedded
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/engines.py --size blocks

# The embedded model in BF16, FP8 and NVFP4, served by vLLM's CPU build, and read by Edge-LLM's
# exporter: environments of their own, 2.8 and 2.2 GB, and outside the tests.
INTEROP_VENV := .venv-interop
EDGE_VENV := .venv-edge
INTEROP_OUT := runs/interop
INTEROP_ITEMS ?= 100
EMBEDDED := model/embedded/model.safetensors
INTEROP_QUANTIZED := $(INTEROP_OUT)/fp8/manifest.json $(INTEROP_OUT)/nvfp4/manifest.json

interop: interop-vllm interop-edge

interop-vllm: install $(INTEROP_VENV)/.installed $(INTEROP_QUANTIZED)
	$(BIN)/python -m nvvl.tools.interop.reference $(INTEROP_OUT) --items $(INTEROP_ITEMS) \
		bf16=model/embedded fp8=$(INTEROP_OUT)/fp8 nvfp4=$(INTEROP_OUT)/nvfp4
	for pair in bf16=model/embedded fp8=$(INTEROP_OUT)/fp8 nvfp4=$(INTEROP_OUT)/nvfp4; do \
		$(INTEROP_VENV)/bin/python tools/interop/vllm_cpu.py "$${pair#*=}" \
			$(INTEROP_OUT)/reference.json "$(INTEROP_OUT)/vllm-$${pair%%=*}.json" || exit 1; \
	done
	$(BIN)/python -m nvvl.tools.interop.judge $(INTEROP_OUT)

interop-edge: install $(EDGE_VENV)/.installed $(INTEROP_QUANTIZED) $(INTEROP_OUT)/blocks/config.json
	$(EDGE_VENV)/bin/python tools/interop/edge_llm.py $(INTEROP_OUT)/edge \
		$(INTEROP_OUT)/fp8 $(INTEROP_OUT)/nvfp4
	$(EDGE_VENV)/bin/python tools/interop/edge_llm.py --visual $(INTEROP_OUT)/edge $(INTEROP_OUT)/blocks

$(INTEROP_OUT)/blocks/config.json: | install
	$(BIN)/python benchmarks/make_checkpoint.py --size blocks $(INTEROP_OUT)/blocks

$(INTEROP_OUT)/%/manifest.json: $(EMBEDDED) | install
	$(BIN)/nvvl quantize $* embedded $(INTEROP_OUT)/$* --samples 256 --overwrite

$(INTEROP_VENV)/.installed: tools/interop/requirements.txt
	$(PYTHON) -m venv --clear $(INTEROP_VENV)
	$(INTEROP_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

$(EDGE_VENV)/.installed: tools/interop/requirements-edge.txt
	$(PYTHON) -m venv --clear $(EDGE_VENV)
	$(EDGE_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $<
	@touch $@

wheel-test: install
	$(BIN)/python tools/wheel_test.py

clean:
	rm -rf build dist demo nvvl.egg-info .pytest_cache .mypy_cache .ruff_cache
