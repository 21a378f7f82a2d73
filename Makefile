# make setup      .venv with everything pinned in constraints.txt
# make test       environment, linter, type checker, every test that needs no GPU
# make clients    programs that run an export, each in an environment in .clients/; the tests that run them
# make test-gpu   every test that needs a GPU, and the quickstart on it; report in runs/gpu-report
# make lint       linter, type checker and the documents' links
# make docs       the documents as a site, in build/site
# make clean      caches and build folders; not .venv, .clients, runs/

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup test clients test-gpu lint docs clean

# Tests at a time: those that are one process each; those that start several, of which one mostly waits for another.
PYTEST_WORKERS ?= 2
DISTRIBUTED_WORKERS ?= 2
FIND_PYTHON := python=$$(bash examples/setup_environment.sh --extras test)
# Several processes share the cores, and equal thread counts make equal sums. Hundreds of processes import the same
# modules: they find them compiled.
TEST_ENV := env -u PYTHONDONTWRITEBYTECODE -u RANK -u WORLD_SIZE -u LOCAL_RANK OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONPATH="$$PWD"

# A warning, such as a link to nowhere, is an error.
MKDOCS := NO_MKDOCS_2_WARNING=1 "$$python" -m mkdocs build --quiet --strict

help:
	@sed -n '/^$$/q; s/^# //p' Makefile

setup:
	@bash examples/setup_environment.sh --venv

lint:
	@$(FIND_PYTHON)
	echo "== ruff"
	"$$python" -m ruff check .
	echo "== mypy"
	"$$python" -m mypy
	echo "== mkdocs"
	$(MKDOCS)

docs:
	@$(FIND_PYTHON)
	$(MKDOCS)
	echo "the site is in build/site/index.html"

test: lint
	@$(FIND_PYTHON)
	start=$$SECONDS
	echo "== pytest, one process each, $(PYTEST_WORKERS) at a time"
	status=0
	$(TEST_ENV) "$$python" -m pytest -n $(PYTEST_WORKERS) -m "not gpu and not distributed" --durations=5 || status=$$?
	echo "== pytest, several processes each, $(DISTRIBUTED_WORKERS) files at a time"
	$(TEST_ENV) "$$python" -m pytest -n $(DISTRIBUTED_WORKERS) --dist loadfile -m "distributed and not gpu" --durations=5 ||
		status=$$?
	[ "$$status" = 0 ] || { echo "== failed; the summaries above name the tests" >&2; exit "$$status"; }
	echo "== all passed: tests took $$((SECONDS - start)) s"

# Not a part of make test: what it installs takes five gigabytes.
clients:
	@$(FIND_PYTHON)
	$(TEST_ENV) "$$python" -m tests.clients.environments
	$(TEST_ENV) "$$python" -m pytest tests/clients -o faulthandler_timeout=3600

test-gpu:
	@$(FIND_PYTHON)
	PYTHON="$$python" bash .ci/run_gpu

clean:
	@rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -print | xargs rm -rf
