# `make server-package`: what the administrator of a Caramel server installs, as a wheel and as a Debian package with
# that wheel in it. Both land in build/server/, and the same sources give the same bits.

SERVER_SOURCES := server/pyproject.toml server/README.md $(wildcard server/*.py server/*.conf LICENSE-*) \
	$(shell find server/packaging -type f)
# The time in both is that of the changelog.
SERVER_EPOCH = $$(date --date="$$(sed -n '/^ -- /{s/.*>  //p;q}' server/packaging/debian/changelog)" +%s)

.PHONY: server-package

server-package: $(BUILD)/server/built ## for a Caramel server's administrator: a wheel and a Debian package, into build/server/
	@SOURCE_DATE_EPOCH=$(SERVER_EPOCH) BUILD="$(abspath $(BUILD))" server/packaging/deb.sh $(BUILD)/server/*.whl
	@ls $(BUILD)/server/*.whl $(BUILD)/server/*.deb

# From a copy, because setuptools leaves things beside what it builds.
$(BUILD)/server/built: $(SERVER_SOURCES)
	@rm -rf $(@D) && mkdir -p $(@D)/source
	@cp -R server/pyproject.toml server/README.md server/*.py server/*.conf server/packaging LICENSE-* $(@D)/source
	@rm -f $(@D)/source/test_*.py
	$(PYTHON) -m venv $(@D)/builder
	SOURCE_DATE_EPOCH=$(SERVER_EPOCH) $(@D)/builder/bin/python -m pip wheel --quiet --disable-pip-version-check \
		--no-deps --wheel-dir $(@D) $(@D)/source
	@touch $@
