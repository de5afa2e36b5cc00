.PHONY: help setup demo test random lint format docs linkcheck exactness bench clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 12

setup: ## Set up .venv with the package and the tools
	./dev setup

demo: ## Show the package at work on a trained network
	./dev demo

test: ## Lint, check the types and the imports, run the tests
	./dev test

random: ## RANDOM_NETWORKS=5000 random networks, new ones on every call, and some in threads; prints how many it tried
	./dev setup
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest tests/test_random_networks.py --hypothesis-profile=random --hypothesis-show-statistics

lint: ## Lint, check the types and the imports
	./dev lint

format: ## Format the code and mend what ruff can mend
	./dev format

docs: ## Build the site into docs/_build/html, warnings as errors; examples and notebooks run if they changed
	./dev docs

linkcheck: ## Try every link of the site that leads elsewhere; needs the internet
	./dev docs linkcheck

exactness: ## Four tests of every layer of the shipped networks in float64, about 15 minutes; continues a stopped run
	./dev setup
	.venv/bin/python benchmarks/exactness.py --docs docs/exactness.md

bench: ## Speed and memory beside named peers on an idle machine, about an hour; goes on where it was stopped
	./dev setup
	$(firstword $(wildcard .venv-peers/bin/adjointbackmap) .venv/bin/adjointbackmap) bench --out docs/results/speed.json --docs docs/speed.md

clean: ## Remove the environment, the builds and the caches
	rm -rf .venv dist docs/_build docs/examples .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
