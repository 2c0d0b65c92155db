.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
RESULTS ?= model_cards/results

.PHONY: help setup demo test versions lint fix types bench card

help: ## list what can be made
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

setup: ## create .venv from the pinned lock
	@bash scripts/setup.sh

demo: ## the main job: convert a real model, quantize it, adapt it, reload it and ask it a question
	@bash scripts/demo.sh $(ARGS)

test: ## set up, then the whole test suite with coverage (ARGS="tests/test_house.py -x" narrows it)
	@bash scripts/test.sh --cov=modeling_flashlite --cov-report=term:skip-covered $(ARGS)

lint: setup ## ruff check and format, without changing anything
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

fix: setup ## let ruff mend what it can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: setup ## mypy on the whole package
	$(PYTHON) -m mypy modeling_flashlite

versions: setup ## the contract on the oldest, locked and newest transformers
	@bash scripts/versions.sh $(ARGS)

bench: setup ## speed and memory against named peers
	$(PYTHON) scripts/bench.py $(ARGS)

card: setup ## rewrite README's table from the results files
	$(PYTHON) scripts/studies/readme_table.py
