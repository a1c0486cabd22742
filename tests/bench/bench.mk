# `make bench`: what one check costs, here and with what people use today. See tests/bench/measure.py.

BENCH_ROUNDS ?= 15

.PHONY: bench bench-keys bench-link

bench: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed \
		$(BUILD)/bench/urllib3/installed $(BUILD)/bench/client/installed \
		$(BUILD)/authority/installed ## what one check costs, side by side with what people use today
	cd tests && BENCH_ROUNDS="$(BENCH_ROUNDS)" $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.measure

bench-link: $(BUILD)/venv/installed $(BUILD)/tests/installed $(BUILD)/trixie/installed ## bytes of a check with the OpenSSL of Debian 12 and 13 (root, 3 min)
	@cd tests && $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.link

bench-keys: $(BUILD)/venv/installed $(BUILD)/tests/installed $(BUILD)/trixie/installed ## what a key in a TPM costs an unchanged check (root, 2 min)
	@cd tests && BENCH_ROUNDS="$(BENCH_ROUNDS)" $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.keys

# The floor: the newest urllib3, and nothing else.
$(BUILD)/bench/urllib3/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) urllib3
	@touch $@

# The Python client of today. It uses distutils, which left the standard library in 3.12; setuptools has a copy.
$(BUILD)/bench/client/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(PIP_INSTALL) 'caramel-client==1.5.3' 'setuptools<81'
	@touch $@
