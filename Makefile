.PHONY: help setup demo test lint format exactness clean

help: ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /\1\t/' | expand -t 12

setup: ## Set up .venv with the package and the tools
	./dev setup

demo: ## Show the package at work on a trained network
	./dev demo

test: ## Lint, check the types and the imports, run the tests
	./dev test

lint: ## Lint, check the types and the imports
	./dev lint

format: ## Format the code and mend what ruff can mend
	./dev format

exactness: ## Every unit of the five networks on ten images in float64; goes on where it was stopped
	./dev setup
	.venv/bin/python benchmarks/exactness.py

clean: ## Remove the environment, the builds and the caches
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
