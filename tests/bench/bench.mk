# `make bench`: what one check costs, here and with what people use today. See tests/bench/README.md.

BENCH_ROUNDS ?= 15

.PHONY: bench

bench: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed \
		$(BUILD)/bench/urllib3/installed $(BUILD)/bench/client/installed ## what one check costs, side by side with what people use today
	cd tests && BENCH_ROUNDS="$(BENCH_ROUNDS)" $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.measure
	$(BUILD)/tests/bin/python -I docs/figures.py

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
