# The commands of Idem; `make` alone lists them. Each sets up what it needs: Python 3.11 to 3.13 is all it asks for.
# Options are given behind the command (make demo PORT=9000). The environment is not read for them: PORT or NAME is set
# for other reasons on many machines.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
.PHONY: help setup demo test test-all check bench clean

PRODUCTS :=
CATALOG :=
RUN :=
MINUTES :=
SERVE := 1
PORT :=
FRESH := 0
NAME :=
ARGS :=
HARDWARE := cpu

# Nothing here talks to the network at run time, and nothing counts its users.
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1
export TRANSFORMERS_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export LANCE_LOG := error

python := .venv/bin/python
checksum = $(firstword $(shell cat $(1) | cksum))
installed := .venv/.installed-$(HARDWARE)-$(call checksum,requirements.txt requirements-$(HARDWARE).txt)
installed_bench := .venv/.installed-bench-$(call checksum,requirements-bench.txt)
installed_dev := .venv/.installed-dev-$(call checksum,requirements-dev.txt)

help: ## this list
	@printf 'Idem: the very same product among billions, from a photo, a text, or both.\n\n'
	@awk -F ' *## ' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "  \033[1mmake %-9s\033[0m %s\n", $$1, $$2} \
	  /^##  / {printf "  %14s   %s\n", "", substr($$0, 5)}' Makefile | if [ -t 1 ]; then cat; else sed 's/\x1b\[[0-9]*m//g'; fi

setup: $(installed) ## make .venv and install what the demo needs; the commands below do it themselves
##  HARDWARE=gpu takes the CUDA build of faiss
	@:

demo: $(installed) ## the whole road on a shop that it draws; leaves the service up with a page to search by photo
##  PRODUCTS=600 how many to draw     CATALOG=path your own records (parquet) instead
##  SERVE=0 stop after the report     PORT=8000 where the page is
##  MINUTES=n training time           FRESH=1 throw the earlier run away first
##  RUN=runs/x.toml another run file
	@$(if $(filter 1,$(FRESH)),$(throw_away))
	@$(python) -m serve.demo '$(run)' $(options) || { code=$$?; [ $$code = 130 ] || exit $$code; }

run = $(or $(RUN),$(if $(CATALOG),runs/catalog.toml,runs/demo.toml))
# What is drawn or read otherwise than the run file says gets a folder of its own; "" is that of the run file. The shell's
# basename, because make's functions take a path with a space for two.
another_size = $(if $(CATALOG),,$(filter-out 600,$(PRODUCTS)))
root = $(if $(CATALOG),out/$(shell basename '$(CATALOG)' .parquet),$(if $(another_size),out/$(shell basename '$(run)' .toml)-$(PRODUCTS)))
options = $(if $(CATALOG),--catalog '$(CATALOG)',$(if $(PRODUCTS),--set 'catalog.products=$(PRODUCTS)')) \
  $(if $(root),--set 'root=$(root)') $(if $(MINUTES),--set 'train.loop.minutes=$(MINUTES)') \
  $(if $(PORT),--port '$(PORT)') $(if $(filter 0,$(SERVE)),--no-serve)

define throw_away
root='$(root)'; \
	root=$${root:-$$($(python) -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["root"])' '$(run)')}; \
	[[ "$$root" = out/?* && "$$root" != *..* ]] || { \
	  echo "FRESH=1 removes folders below out/ only, and the root of $(run) is $$root" >&2; exit 2; }; \
	rm -rf -- "$$root"
endef

# Two OpenMP threads beside another busy process spin-wait: a forward pass of 12 ms was seen to take 1.15 s.
test test-all: export OMP_NUM_THREADS := 1

test: $(installed) $(installed_dev) ## every kind of test, each fault with one seed
##  ARGS="-k words" passes on to pytest
	@$(python) -m pytest -m 'not slow' $(ARGS)

test-all: $(installed) $(installed_dev) ## the same with more seeds and sizes
	@$(python) -m pytest $(ARGS)

check: $(installed) $(installed_dev) ## format, lint, types and import contracts
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m pyright
	@.venv/bin/lint-imports

bench: $(installed) $(if $(filter index,$(NAME)),$(installed_bench)) ## one benchmark against its peers: NAME=ingest, head, embed, index, rerank or serve
	@if [ ! -f 'benchmarks/$(NAME).py' ]; then \
	  echo "no benchmark called '$(NAME)'; there are: $$(cd benchmarks 2>/dev/null && ls *.py 2>/dev/null | sed 's/\.py$$//' | xargs)" >&2; exit 2; fi
	@$(python) -m 'benchmarks.$(NAME)' $(ARGS)

clean: ## remove caches and everything below out/ (not .venv)
	@rm -rf out .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamps' names carry a checksum of what was installed, so they need no prerequisites.
define install
	@for candidate in $(python) python3 python3.13 python3.12 python3.11; do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    exec "$$candidate" .ci/setup.py $@ $(1); \
	  fi; \
	done; \
	echo "Idem needs Python 3.11, 3.12 or 3.13 with the module venv; python3 here is: $$(python3 --version 2>&1)" >&2; \
	echo "On Debian and Ubuntu: apt install python3 python3-venv" >&2; exit 1
endef

$(installed):
	$(call install,requirements-$(HARDWARE).txt)

$(installed_dev): | $(installed)
	$(call install,requirements-dev.txt)

$(installed_bench): | $(installed)
	$(call install,requirements-bench.txt)
