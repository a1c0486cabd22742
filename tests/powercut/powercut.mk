# `make powercut`: the power of a real kernel with real file systems is cut at random instants. Needs root, and
# qemu-system-x86, mmdebstrap, e2fsprogs, cpio, kmod.

.PHONY: powercut powercut-short

powercut: ## power cuts under real file systems, 100 for each (30 min)
	@$(BUILD)/tests/bin/python -B tests/powercut

powercut-short: ## the same, 20 cuts on vfat and ext4 (2 min)
	@$(BUILD)/tests/bin/python -B tests/powercut --short
