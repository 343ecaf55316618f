# Both targets set everything up first, in .venv; the second time that takes no time. CPU by default.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
export PYTHON TORCH TORCH_INDEX

.PHONY: setup demo test lint

setup:
	@scripts/setup.sh

demo: setup
	.venv/bin/mucs run experiment=digits

test: setup
	.venv/bin/python -m pytest -n auto --dist loadfile  # each file in one process, which makes its runs once

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
