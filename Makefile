# All that can be done with this project; `make help` lists it. Everything made lands in build/, so that two clones
# don't know of each other. Needs Python 3.9 or newer, make, and the package index.

PYTHON ?= python3
BUILD := build

# Names of tests, options for pytest, and how many run at a time:
# make test TESTS=tests/test_world.py PYTEST=-x JOBS=1
# With COVERAGE=1 it also says which lines of the program were not reached.
# `make test` has those of the program that devices run; `make test-all` also those of the servers' side.
TESTS ?= tests
PYTEST ?=
# Half as many again as there are cores: a third of the time a test waits for a server.
JOBS ?= $(shell echo $$(($$(nproc 2>/dev/null || echo 2) * 3 / 2)))

SOURCES := $(wildcard pyproject.toml setup.py setup.cfg packaging/bake.py packaging/starter/*) \
	$(shell find caramel_embedded -type f -not -name '*.py[co]' 2>/dev/null)
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-warn-script-location

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-server test test-all coverage style clean

help: ## this list
	@sed -e ':a' -e '/\\$$/{N;s/\\\n//;ba' -e '}' $(MAKEFILE_LIST) | \
	sed -nE 's/^([a-z-]+):.*## /\1|/p' | LC_ALL=C sort | \
	while IFS='|' read -r target what; do printf '  make %-14s %s\n' "$$target" "$$what"; done

demo: $(BUILD)/venv/installed $(BUILD)/caramel/installed ## the life of a device, run by run, against a real Caramel server
	@cd tests && $(CURDIR)/$(BUILD)/venv/bin/python -Es -m demo.life

demo-server: $(BUILD)/venv/installed $(BUILD)/caramel/installed ## a Caramel server to play with by hand
	@cd tests && $(CURDIR)/$(BUILD)/venv/bin/python -Es -m demo.life --stay

# Under coverage the command under test is the one beside pytest, because coverage is there as well: it says which lines ran
# in all of the command's runs. Its report comes before pytest's last line, which says how the tests went. It makes each run
# of the command two fifths dearer, so `make test` does without.
UNDER_COVERAGE = COVERAGE_PROCESS_START="$(CURDIR)/tests/coverage.ini" COVERAGE_FILE="$(CURDIR)/$(BUILD)/coverage/data" \
	CARAMEL_TESTS_COMMAND="$(CURDIR)/$(BUILD)/tests/bin/caramel-embedded"

test: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed ## style, types, and the tests that this machine can do in 3 min
	@echo "test: style and types of all Python"
	$(BUILD)/tests/bin/ruff check --quiet .
	$(BUILD)/tests/bin/ruff format --quiet --check .
	$(BUILD)/tests/bin/mypy caramel_embedded packaging server authority tests examples
	@for name in $(TESTS); do [ -e "$${name%%::*}" ] || { echo "make test: TESTS=: there is no $$name" >&2; exit 1; }; done
	@rm -rf $(BUILD)/coverage && mkdir -p $(BUILD)/coverage
	$(if $(COVERAGE),$(UNDER_COVERAGE)) \
	CARAMEL_TESTS_PASSED="$(CURDIR)/$(BUILD)/tests/passed" CARAMEL_TESTS_REST="$(REST)" \
	$(BUILD)/tests/bin/python -I -m pytest --numprocesses $(JOBS) --dist worksteal $(PYTEST) $(TESTS)

# What `make test` would leave out fails here if it can't be run. The emulated device and the power cuts come first, so that
# the last lines are those of the tests. With REST=1 it leaves out what has passed in `make test` of this build, if nothing
# has changed since.
test-all: device-test powercut-short $(BUILD)/bench/client/installed $(BUILD)/busybox-static/bin/busybox ## everything, nothing is skipped (root, 30 min)
	@CARAMEL_TESTS_NO_SKIP=1 $(MAKE) --no-print-directory test TESTS="tests server authority"

coverage: ## everything, and which lines of the program no test reached (root, 45 min)
	@$(MAKE) --no-print-directory test-all COVERAGE=1

style: $(BUILD)/tests/installed ## repairs the style of what can be repaired
	$(BUILD)/tests/bin/ruff check --fix .
	$(BUILD)/tests/bin/ruff format .

clean: ## removes everything made
	rm -rf $(BUILD) *.egg-info

# The package, as others would install it. setuptools keeps what it copied in build/lib and would put modules that are gone
# from the sources into the next wheel; so that goes first.
$(BUILD)/wheel/built: $(SOURCES)
	@echo "build: the package, as others would install it"
	@rm -rf $(BUILD)/lib $(BUILD)/bdist.* $(@D) && mkdir -p $(@D)
	$(PYTHON) -m venv $(BUILD)/builder
	$(BUILD)/builder/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(@D) .
	@touch $@

# The program by itself, with nothing beside it but what it needs.
$(BUILD)/venv/installed: $(BUILD)/wheel/built
	@echo "build: the program, in an environment of its own (build/venv)"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps $(BUILD)/wheel/*.whl
	$(@D)/bin/python $(PIP_INSTALL) $(BUILD)/wheel/*.whl
	@touch $@

# The tools of the tests, and the program once more: units import it, and coverage watches it.
$(BUILD)/tests/tools: tests/requirements.txt
	@echo "build: pytest, mypy, ruff and what else the tests use (build/tests); the first time it takes about a minute"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) -r tests/requirements.txt
	@# Newer releases of coverage bring this file themselves; twice does no harm.
	@echo 'import os; os.getenv("COVERAGE_PROCESS_START") and __import__("coverage").process_startup()' \
	>"$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/coverage-of-runs.pth"
	@touch $@

$(BUILD)/tests/installed: $(BUILD)/tests/tools $(BUILD)/wheel/built
	$(@D)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps $(BUILD)/wheel/*.whl
	$(@D)/bin/python $(PIP_INSTALL) $(BUILD)/wheel/*.whl
	@touch $@

# The server, in an environment of its own: it uses what newer pyOpenSSL has removed. Nothing here imports any of it.
$(BUILD)/caramel/installed:
	@echo "build: the Caramel server, in an environment of its own (build/caramel)"
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) 'caramel==1.9.6' 'pyOpenSSL<24.3'
	@touch $@

# packaging.mk, which also works by itself, brings what stands in its folders.
-include $(wildcard packaging/*.mk tests/*/*.mk server/*/*.mk authority/*.mk)
