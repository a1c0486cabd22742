# `make powercut`: the power of a real kernel with real file systems is cut at random instants. Needs root, and
# qemu-system-x86, mmdebstrap, e2fsprogs, cpio, kmod, gcc, make, libelf1, libssl3, nginx.

POWERCUT = cd tests && BUILD=$(BUILD) nice -n 10 $(CURDIR)/$(BUILD)/tests/bin/python -Es -m powercut

.PHONY: powercut powercut-short

powercut: $(BUILD)/caramel/installed $(BUILD)/tests/installed ## power cuts under real file systems, 100 for each (two hours, less with JOBS=2)
	@$(POWERCUT) --jobs $(or $(JOBS),1)

powercut-short: $(BUILD)/tests/installed ## the same, 20 cuts on vfat and ext4 (2 min)
	@$(POWERCUT) --short
