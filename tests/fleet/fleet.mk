# `make fleet`: what a fleet costs its server. See tests/fleet/measure.py.

# Seconds that each load is measured for, and how many devices take turns.
FLEET_SECONDS ?= 10
FLEET_DEVICES ?= 2000

.PHONY: fleet

fleet: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed \
		$(BUILD)/fleet/installed ## what a check costs the server under load, and as the fleet grows (3 min)
	@cd tests && FLEET_SECONDS="$(FLEET_SECONDS)" FLEET_DEVICES="$(FLEET_DEVICES)" \
	$(CURDIR)/$(BUILD)/tests/bin/python -Es -m fleet.measure

test-all: $(BUILD)/fleet/installed

# Locust brings a web framework and much more, so it has an environment of its own.
$(BUILD)/fleet/installed: tests/fleet/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) -r tests/fleet/requirements.txt
	@touch $@
