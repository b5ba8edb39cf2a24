# Everything a checkout needs: each target sets up .venv by itself first.
# A machine without a GPU can save the CUDA packages with pip's own setting:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SANITIZER := compute-sanitizer --error-exitcode 1

.PHONY: demo test test-long test-gpu sanitize lint bench bench-kernels clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(READY) ## the main job on the model in examples/demo-model
	$(BIN)/python examples/02_demo.py

test: $(READY) ## every test that needs no GPU, without one; kernels run in Triton's interpreter
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not gpu and not long" --numprocesses auto --maxprocesses 4

test-long: $(READY) ## malformed checkpoints, code traps, kills and random calls by the hundred: about an hour
	CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --numprocesses 2 -s

test-gpu: $(READY) ## the tests that need a CUDA device; kernels compile in many processes
	$(BIN)/python -m pytest -m gpu --numprocesses auto --maxprocesses 12

sanitize: $(READY) ## one pass of each kernel under CUDA's memory and race checkers
	$(BIN)/python -m tests.kernels.triton.one_pass memory # compiles, which the checkers slow down
	$(SANITIZER) --tool memcheck $(BIN)/python -m tests.kernels.triton.one_pass memory
	$(SANITIZER) --tool racecheck $(BIN)/python -m tests.kernels.triton.one_pass races

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## memory, prefill and decode of the demo model and its peers, on whatever device there is
	$(BIN)/hysparse convert examples/demo-model demo-out/bench --recipe recipes/demo.yaml --overwrite
	$(BIN)/hysparse bench demo-out/bench --context 512,1024

bench-kernels: $(READY) ## the attention ops beside other people's on a GPU: make bench-kernels ARGS="--ops full --context 8k"
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf .venv demo-out .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache
