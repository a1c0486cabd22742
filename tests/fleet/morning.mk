# `make morning-after`: what a fleet does to its server when the power is back; docs/morning-after.md.

.PHONY: morning-after

morning-after: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed ## the morning after a power cut: two thousand real starts, and a million simulated ones (15 min)
	cd tests && $(CURDIR)/$(BUILD)/tests/bin/python -Es -m fleet.morning $(MORNING)
