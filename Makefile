# make install | demo | test | lint | arena-model
# Needs only Python >= 3.11 and make. Everything goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint format arena-model clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one by: make PYTHON=python3.12" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Language Self-Play in the built-in arena: under 5 minutes of play on 2 cores.
demo: install
	$(BIN)/lsp train arena

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix src tests
	$(BIN)/ruff format src tests

# Pretrain the built-in model again, from scratch: under 15 minutes on 2 cores.
arena-model: install
	$(BIN)/python -m language_self_play.arena.pretrain src/language_self_play/arena/model

clean:
	rm -rf .venv
