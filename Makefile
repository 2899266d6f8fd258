# demo, test and test-compile make their own .venv from a bare Python >= 3.10 with pip and venv.
# test-gpu and bench use the Python they find, with its PyTorch and Triton, and install nothing.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-compile test-gpu bench

help:  ## list the targets
	@grep -h '##' $(MAKEFILE_LIST) | grep -v grep | sed 's/:.*## */: /'

demo: $(READY)  ## train a small model here, recall, measure, and show all in demo/page.html
	$(BIN)/python -m examples.demo

test: $(READY)  ## lint, types and the tests that need no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 -m "not gpu and not wide"

test-compile: $(READY)  ## compile the kernels for every GPU, with the pinned and the newest Triton
	$(BIN)/pytest -m wide
	$(BIN)/pip install --quiet --upgrade --no-deps --target .venv/newest triton
	PYTHONPATH=.venv/newest $(BIN)/pytest -m wide

test-gpu:  ## the tests that need a GPU
	$(PYTHON) -m pytest -m gpu

bench:  ## measure: on the GPU where there is one, else on the CPU
	$(PYTHON) -m benchmarks

# torch comes first and pinned: asked for as a dependency, without a version, it would be the newest
# build, with CUDA libraries of several GB, even where a CPU build of this version is at hand.
# Triton is the version that the kernels are verified on.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install torch==2.13.0
	$(BIN)/pip install --editable '.[triton,test,dev]' triton==3.6.0
	touch $@
