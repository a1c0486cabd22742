# What devices live through, with figures: see tests/torture/. Needs root (mounts, name spaces), strace, faketime, nginx,
# e2fsprogs, iproute2, util-linux, and mmdebstrap for the devices with a TPM.

# Options, such as --only chip --chip-calls 60.
TORTURE ?=

.PHONY: torture

torture: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed ## kills, faults, clocks, networks: what survives (25 min)
	@cd tests && $(CURDIR)/$(BUILD)/tests/bin/python -Es -m torture $(TORTURE)
