# Two commands matter: `make train` and `make test`. Both make their environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: train test check format clean

train: $(INSTALLED)  ## run the default experiment; ARGS="+experiment=NAME key=value" changes it
	@$(BIN)/python scripts/train.py $(ARGS)

test: check  ## linter, formatter, types, and all tests
	@$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)  ## linter, formatter in check mode, type checker
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

# Made again whenever the dependencies change.
$(INSTALLED): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,reasoning-gym]"
	@touch $@
