# The registration authority: an environment of its own, its types, its demo. Its tests are among those of `make test-all`.
# It needs Python 3.11; where there is only an older one, it isn't installed, and its tests say that they were skipped.

AUTHORITY := authority
AUTHORITY_SOURCES := $(AUTHORITY)/pyproject.toml $(AUTHORITY)/README.md \
	$(shell find $(AUTHORITY)/caramel_authority -type f -not -name '*.py[co]')

.PHONY: authority-demo authority-types bench-authority

authority-demo: $(BUILD)/venv/installed $(BUILD)/authority/installed ## the life of a device without Caramel: with a CA of one's own, then with an ACME CA
	@PYTHONPATH=tests:$(AUTHORITY)/tests $(BUILD)/venv/bin/python -m authority_demo

bench-authority: $(BUILD)/tests/installed $(BUILD)/authority/installed ## what 90 000 devices cost the registration authority (PostgreSQL, 3 min)
	@PYTHONPATH=tests:$(AUTHORITY)/tests $(BUILD)/tests/bin/python -m authority_bench

authority-types: $(BUILD)/authority/installed
	@test ! -e $(BUILD)/authority/bin/mypy || \
	$(BUILD)/authority/bin/mypy --strict --config-file= --cache-dir $(BUILD)/mypy-cache-authority $(AUTHORITY)/caramel_authority

# `make test-all` has the authority's tests among its own.
ifneq ($(filter authority%,$(TESTS)),)
test: authority-types
endif

# From a copy, because setuptools leaves things beside what it builds.
$(BUILD)/authority/installed: $(AUTHORITY_SOURCES)
	@rm -rf $(@D)-source && mkdir -p $(@D) $(@D)-source
	@cp -r $(addprefix $(AUTHORITY)/,pyproject.toml README.md caramel_authority) $(@D)-source
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		$(PYTHON) -m venv $(@D) && \
		$(@D)/bin/python $(PIP_INSTALL) gunicorn mypy types-waitress types-requests '$(@D)-source[postgresql]'; \
	else echo "the registration authority is left out: it needs Python 3.11"; fi
	@touch $@
