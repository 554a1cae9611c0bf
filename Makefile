# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEXT := .venv-triton-next
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

# What a call of the driver returned is looked at where it is called: NVIDIA's Python bindings ask for
# functions that are not there.
SANITIZE := compute-sanitizer --report-api-errors no --error-exitcode 1

.PHONY: install run test lint types unit test-extended soak test-llama-cpp test-convergence test-gpu
.PHONY: memcheck
.PHONY: test-triton-next results recipes clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt src/onelaunch/__init__.py
	@sh tools/check_host.sh "$(PYTHON)" "$(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

# The tests need the extras. Triton is not among them: torch's CUDA build brings its own.
$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c constraints.txt \
		-e '.[hf,tokenizer,gguf,bench,coreml,serve,dev]'
	@touch $@

# With torch's CPU build, Triton interprets kernels and compiles them for devices that are not here, as
# NVRTC does with CUDA C++.
$(VENV)/.installed-triton: $(VENV)/.installed-dev constraints-ci.txt
	@$(BIN)/python -c 'import triton, cuda.bindings.nvrtc' 2>/dev/null || \
		$(BIN)/python -m pip install -q -c constraints.txt -c constraints-ci.txt triton numpy \
			cuda-bindings nvidia-cuda-nvrtc
	@touch $@

run: install
	@$(BIN)/onelaunch train quickstart --run $(RUN)
	@$(BIN)/onelaunch eval $(RUN) --data stories
	@echo "One story, from the first token on:"
	@$(BIN)/onelaunch generate $(RUN) --temperature 0.5 --seed 4
	@echo "It was written by what lies in $(RUN). Another one:"
	@echo "  $(BIN)/onelaunch generate $(RUN) --seed 5 --prompt 'Once there was a boy'"

test: lint types unit

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests tools
	$(BIN)/ruff format --check src tests tools

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# Two at a time, as CI has two cores. What needs a package that is not here is skipped, and a line at
# the end says so.
unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m 'not soak and not extended' -n 2 --dist worksteal

# What `make test` leaves out for its length, and CI runs after it:
# - the kernels in Triton's interpreter and compiled for each target, which need Triton;
# - bench experiments from end to end, whose tables and findings `make test` reads from records;
# - most formats of the fuzz and most wrong readers, of which `make test` has a sample;
# - Core ML's runner with children that hang, and training through it from end to end;
# - the report in a browser, where there is one (CHROME names it).
test-extended: $(VENV)/.installed-triton
	$(BIN)/python -m pytest tests -m 'extended and not soak' -n 2 --dist worksteal

# What takes longest or compares times: the tests so marked, every kill, the whole fuzz, Shakespeare,
# and on a machine with a GPU its forwards (with the packages there: PYTHONPATH=src python3
# tests/soak.py forward). Leaves records in benchmarks/records.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m soak
	$(BIN)/python tests/soak.py
	$(BIN)/python tests/server_soak.py

# llama.cpp's own server tests against ours: LLAMA_CPP is its folder tools/server/tests, GGUF its model
# stories260K (or `onelaunch export` of llama2.c's), PYTHON one with the packages of those tests.
test-llama-cpp: $(VENV)/.installed-dev
	$(PYTHON) tests/llama_cpp.py $(LLAMA_CPP) $(GGUF) --serve $(BIN)/onelaunch

# A small Llama with PyTorch's norm and with the operator: with the packages that $(PYTHON) has where
# these see a GPU, else in $(VENV) through Triton's interpreter.
test-convergence:
	@if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
		PYTHONPATH=src $(PYTHON) tests/convergence/run.py; \
	else \
		$(MAKE) $(VENV)/.installed-triton && $(BIN)/python tests/convergence/run.py; \
	fi

# On a machine with a GPU and the packages already there; six at a time where pytest-xdist is among
# them. Leaves a record in benchmarks/records.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu -p tests.gpu.recording \
		$$($(PYTHON) -c 'import xdist; print("-n 6 --dist loadgroup")' 2>/dev/null)

# There too, with compute-sanitizer: no address that is nobody's, no word read that nobody wrote.
memcheck:
	PYTHONPATH=src $(SANITIZE) --tool memcheck --report-api-errors no $(PYTHON) tests/gpu/memcheck.py
	PYTHONPATH=src $(SANITIZE) --tool initcheck $(PYTHON) tests/gpu/memcheck.py

# The operators' kernels, compiled and interpreted, with the Triton that torch 2.13's CUDA build
# brings: outside CI, in an environment of its own.
test-triton-next: $(NEXT)/.installed
	$(NEXT)/bin/python -c 'import triton; print("Triton", triton.__version__)'
	$(NEXT)/bin/python -m pytest tests/operators -k 'compiled or interpreter'

$(NEXT)/.installed: pyproject.toml constraints.txt constraints-triton-next.txt
	@test -x $(NEXT)/bin/python || $(PYTHON) -m venv $(NEXT)
	$(NEXT)/bin/python -m pip install -q -c constraints.txt -c constraints-triton-next.txt \
		-e '.[dev]' triton
	@touch $@

# What the records say of the published studies; a test fails where it is not of these records.
results: $(VENV)/.installed-dev
	$(BIN)/onelaunch report --again benchmarks/again --markdown docs/results.md

# The reference of training recipes; a test fails where it is not what the classes say.
recipes: $(VENV)/.installed
	$(BIN)/python tools/recipe_reference.py

clean:
	rm -rf $(VENV) $(NEXT) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
