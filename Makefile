# Every target brings up the environment it needs: an active conda environment named activation-sparsity is used
# as it is; otherwise .venv is made from requirements.lock. A second call installs nothing.
#
#   PROFILE=laptop       what `make reproduce` trains (default: gpu with a GPU, laptop without)
#   NOTEBOOKS="02 03"    which notebooks `make reproduce` executes (default: all)
#   FROM=build/laptop    whose tables `make figures` draws (default: the recorded study in results/)
#   RUNS=results/runs    finished runs that `make record` takes up (default: none)
#   KEEP="09 10"         notebooks on pretrained models that `make record` leaves as they are recorded (default: none)
#   SERVE=1              `make book` shows what it made at http://127.0.0.1:8000
#   PYTHON=python3.12    the Python that makes .venv (default: the first suitable one below)
#   LAB="--no-browser"   further options of JupyterLab

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help env reproduce test figures book lab bench check test-slow notebooks record lock clean

PYTHON ?= python3 python3.13 python3.12 python3.11
SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

ifeq ($(notdir $(CONDA_DEFAULT_ENV)),activation-sparsity)
PY := $(CONDA_PREFIX)/bin/python
ENV :=
else
PY := .venv/bin/python
ENV := .venv/.installed
endif

## To read and reproduce

help:  ## list the targets
	@awk -F ':.*## ' '/^## /{printf "%s%s\n", sep, substr($$0, 4); sep = "\n"} \
	  /^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

env: $(ENV)  ## bring up the environment alone; every other target does so by itself

reproduce: $(ENV)  ## train, measure and answer the questions of every notebook, or NOTEBOOKS="02 03"; PROFILE=smoke is the quick proof
	$(PY) -m sparsity_utils reproduce $(if $(PROFILE),--profile "$(PROFILE)") $(if $(NOTEBOOKS),--notebooks $(NOTEBOOKS))

# A worker per core; a file stays with one, so that what it trains is trained once.
SIDE_BY_SIDE := --numprocesses auto --dist loadfile

test: export CI := 1
test: $(ENV) check  ## prove the collection: check, a smoke run of all notebooks, pytest, and nbval over their stored outputs
	$(PY) -m sparsity_utils reproduce --profile smoke
	$(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow"
	$(PY) -m pytest $(SIDE_BY_SIDE) --nbval-lax --nbval-current-env --nbval-cell-timeout=300 notebooks

figures: $(ENV)  ## redraw figures/ from results/, or FROM=build/laptop from your own run
	$(PY) -m sparsity_utils figures $(if $(FROM),--from "$(FROM)")

book: $(ENV)  ## make the collection a site, build/book/, from its stored outputs; SERVE=1 shows it
	rm -rf build/book
	$(PY) -m sphinx -W --keep-going -c docs . build/book
	@echo "build/book/index.html"
	$(if $(SERVE),$(PY) -m http.server --bind 127.0.0.1 --directory build/book)

lab: $(ENV)  ## open JupyterLab on the notebooks
	$(PY) -m jupyterlab notebooks $(LAB)

bench: $(ENV)  ## measure training and measurement speed on this machine
	$(PY) -m sparsity_utils.commands.bench

## To carry on

check: $(ENV)  ## ruff, mypy, and the rules of notebooks, refreshed outputs among them; seconds, the hook of pre-commit
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest --quiet tests/commands/test_notebook_rules.py -k keeps_the_rule

test-slow: export CI := 1
test-slow: $(ENV)  ## the tests marked slow: whole processes, installation, the package index
	$(PY) -m pytest $(SIDE_BY_SIDE) -m slow

notebooks: $(ENV)  ## execute every notebook at its defaults and store its outputs
	$(PY) -m sparsity_utils notebooks

record: $(ENV)  ## make results/, figures/, stored outputs and the book those of a study: PROFILE=long RUNS=results/runs
	@test -n "$(PROFILE)" || { echo "Name the study: make record PROFILE=long RUNS=results/runs" >&2; exit 2; }
	$(PY) -m sparsity_utils study --profile "$(PROFILE)" $(if $(RUNS),--tables "$(RUNS)")
	$(PY) -m sparsity_utils reproduce --profile "$(PROFILE)" $(if $(KEEP),--without $(KEEP))
	$(PY) -m sparsity_utils record --profile "$(PROFILE)" $(if $(KEEP),--keep $(KEEP))
	rm -f figures/*.png figures/*.svg
	$(PY) -m sparsity_utils figures
	$(PY) -m sparsity_utils notebooks
	$(MAKE) book SERVE=

# Versions that are locked stay: the text of the recorded study is the source of locked packages. To upgrade one, delete its
# line from requirements.lock first.
lock: $(ENV)  ## resolve the dependencies of pyproject.toml, adding what is new to requirements.lock
	$(PY) -m venv build/lock && build/lock/bin/python -m pip install --quiet uv
	cp requirements.lock build/requirements.lock
	build/lock/bin/uv pip compile --quiet --universal --no-annotate --no-header --all-extras \
	  pyproject.toml -o build/requirements.lock
	{ echo "# Made from pyproject.toml by 'make lock'."; \
	  sed "s/ ; sys_platform == 'darwin' or sys_platform == 'linux'$$//" build/requirements.lock; } > build/lock/new
	mv build/lock/new requirements.lock

clean:  ## delete build/ (trained runs included) and caches; .venv stays
	rm -rf build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/.installed: requirements.lock pyproject.toml
	$(eval BEGUN := $(shell date +%s))
	@python=; for candidate in $(PYTHON); do \
	  if $$candidate -c '$(SUITABLE)' > /dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "No suitable Python among: $(PYTHON). Install Python 3.11, 3.12 or 3.13 with its venv module" \
	    "(on Debian and Ubuntu the package python3-venv), or name one: make env PYTHON=path/to/python3.12" >&2; \
	  exit 1; \
	fi; \
	if ! .venv/bin/python -c 'import pip; $(SUITABLE)' > /dev/null 2>&1; then \
	  echo "Making .venv with $$($$python --version); this takes a few minutes, once."; \
	  rm -rf .venv && $$python -m venv .venv; \
	fi
	.venv/bin/python -m pip install $(if $(CI),--quiet) --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@; echo "The environment took $$(($$(date +%s) - $(BEGUN))) seconds."
