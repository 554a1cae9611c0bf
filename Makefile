# Two commands do all the set-up: `make run` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEXT := .venv-triton-next
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: install run test lint types unit soak test-convergence test-gpu memcheck test-triton-next
.PHONY: results clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt src/onelaunch/__init__.py
	@sh tools/check_host.sh "$(PYTHON)" "$(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

# The tests need the extras; CI also Triton, for the interpreter and compile-only tests.
$(VENV)/.installed-dev: $(VENV)/.installed constraints-ci.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[hf,tokenizer,bench,coreml,dev]' \
		$(if $(filter true,$(CI)),-c constraints-ci.txt triton)
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

# Two at a time, as CI has two cores; then, one by one, those that time something.
unit: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m 'not soak and not quiet' -n 2 --dist worksteal
	$(BIN)/python -m pytest tests -m 'not soak and quiet'

# What takes long: the tests so marked, every kill, the whole fuzz, Shakespeare, and on a machine with
# a GPU its forwards (with the packages there: PYTHONPATH=src python3 tests/soak.py forward). Leaves
# records in benchmarks/records.
soak: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests -m soak
	$(BIN)/python tests/soak.py

# A small Llama with PyTorch's norm and with the operator: with the packages that $(PYTHON) has where
# these see a GPU, else in $(VENV) through Triton's interpreter.
test-convergence:
	@if $(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then \
		PYTHONPATH=src $(PYTHON) tests/convergence/run.py; \
	else \
		$(MAKE) $(VENV)/.installed-dev && \
		{ $(BIN)/python -c 'import triton' 2>/dev/null || \
		  $(BIN)/python -m pip install -q -c constraints.txt -c constraints-ci.txt triton numpy; } && \
		$(BIN)/python tests/convergence/run.py; \
	fi

# On a machine with a GPU and the packages already there; six at a time where pytest-xdist is among
# them. Leaves a record in benchmarks/records.
test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest tests/gpu -p tests.gpu.recording \
		$$($(PYTHON) -c 'import xdist; print("-n 6 --dist loadgroup")' 2>/dev/null)

# There too, with compute-sanitizer: no address that is nobody's, no word read that nobody wrote.
memcheck:
	PYTHONPATH=src compute-sanitizer --tool memcheck --error-exitcode 1 $(PYTHON) tests/gpu/memcheck.py
	PYTHONPATH=src compute-sanitizer --tool initcheck --error-exitcode 1 $(PYTHON) tests/gpu/memcheck.py

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

clean:
	rm -rf $(VENV) $(NEXT) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
