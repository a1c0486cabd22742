# `make device-test-tpm`: a device with a TPM behind a real kernel's /dev/tpmrm0. Needs root, and qemu-system-x86,
# mmdebstrap, e2fsprogs, cpio, kmod, xz-utils, nginx.

.PHONY: device-test-tpm

device-test-tpm: $(BUILD)/tests/installed $(BUILD)/authority/installed ## a machine under qemu whose key is in its TPM (swtpm): enrolled, renewed, power cut, chip replaced and cleared (root, 5 min)
	@cd tests && PYTHONPATH=.:$(CURDIR)/$(AUTHORITY)/tests $(CURDIR)/$(BUILD)/tests/bin/python -B -s -m device.tpm_life
