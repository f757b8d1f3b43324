# Everything lives in .venv; a target sets up what it needs first.
PYTHON ?= python3
BIN := .venv/bin
MODEL := examples/shakespeare.safetensors

.PHONY: dev run test lint bench audit sanitize soak gpu-compile gpu-check clean

dev: .venv/installed

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.py')

# Files of other hashes than those in requirements/ are refused. torch is fetched first, or pip would prefer a wheel whose
# hash its index tells, which has CUDA, to one for CPUs that lies in a folder. With TORCH_INDEX, torch is of that index
# and not compared: PyTorch's own has wheels for CPUs, whose hashes are not known here for every Python.
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-deps
HASHED := --require-hashes --requirement requirements
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements/torch.txt)

.venv/installed: pyproject.toml setup.py $(wildcard requirements/*.txt) $(SOURCES)
	$(PYTHON) -m venv .venv
	$(INSTALL) $(HASHED)/packages.txt
	$(PIP) download --no-deps --dest build/torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(INSTALL) $(if $(TORCH_INDEX),build/torch/*.whl,--no-index --find-links build/torch $(HASHED)/torch.txt)
	@rm -r build/torch
	@if $(BIN)/python -c "from importlib.metadata import requires as r; exit('nvidia-' not in str(r('torch')))"; then \
		$(INSTALL) $(HASHED)/cuda.txt; fi
	$(INSTALL) --no-build-isolation --editable .
	@$(PIP) check
	@$(BIN)/python -c "from thl_engine.ops import native; print('native kernels:', native.isa() if native.available() else native.reason())"
	@touch $@

run: dev
	$(BIN)/thl-run --model $(MODEL) --stream --prompt "ROMEO:" --max-new-tokens 200 --temperature 0.7 --seed 1 --stats

# Two processes, each with one thread for torch: its operations here are too small to share. A process that crashes ends
# the run and names its test; restarted, it would wait for ever.
test: dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 --benchmark-disable tests

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: dev
	$(BIN)/python -m pytest -q benchmarks --benchmark-only

audit:  # known holes in what `make` installs; needs pip-audit: pip install pip-audit
	pip-audit --strict --disable-pip --require-hashes $(foreach file,packages torch cuda,--requirement requirements/$(file).txt)

# Half an hour and more on two cores: gcc's sanitizers, over programs that drive the pool, the reader and the copy engine,
# and over the tests of all that the C++ extension does.
sanitize: dev
	$(BIN)/python tests/native/sanitize.py

soak: dev  # ten minutes of one core
	$(BIN)/python benchmarks/soak.py

# Every triton kernel for the supported cards, without a GPU: minutes, unless triton's cache has them. It is in
# ~/.triton/cache, or in TRITON_CACHE_DIR, and serves every clone on the machine. 86 and 89, which are alike, share.
gpu-compile: dev
	OMP_NUM_THREADS=1 $(BIN)/python tests/kernels/compile_triton.py 75,80,86,89,90 --share

# On a machine with a GPU, network or not: with .venv where there is one, else with the python3 that has torch for it.
gpu-check:  # builds, tests and measures; STAGES="kernels pager" runs some
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(STAGES)

clean:
	rm -rf .venv build
