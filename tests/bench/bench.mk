# `make bench`: what one check costs, here and with what people use today. See tests/bench/README.md.

BENCH_ROUNDS ?= 15

.PHONY: bench bench-again bench-keys bench-link

bench: $(BUILD)/venv/installed $(BUILD)/caramel/installed $(BUILD)/tests/installed \
		$(BUILD)/bench/urllib3/installed $(BUILD)/bench/client/installed $(BUILD)/bench/before/installed \
		$(BUILD)/authority/installed ## what one check costs, side by side with what people use today
	cd tests && BENCH_ROUNDS="$(BENCH_ROUNDS)" $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.measure

bench-link: $(BUILD)/venv/installed $(BUILD)/tests/installed $(BUILD)/trixie/installed ## bytes of a check with the OpenSSL of Debian 12 and 13 (root, 3 min)
	@cd tests && $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.link

bench-keys: $(BUILD)/venv/installed $(BUILD)/tests/installed $(BUILD)/trixie/installed ## what a key in a TPM costs an unchanged check (root, 2 min)
	@cd tests && BENCH_ROUNDS="$(BENCH_ROUNDS)" $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.keys

# From the figures of the last run: for whoever changes what the pages say.
bench-again: $(BUILD)/tests/installed ## the pages of the benchmark once more, from its last figures
	cd tests && $(CURDIR)/$(BUILD)/tests/bin/python -Es -m bench.measure --again

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

# This program before it stood on its three packages, beside which it is measured: the tag, or where that isn't at hand the
# last commit that had the starter of that release. Without a history there is nothing to compare with, and the pages say so.
BEFORE := 1.0.0
$(BUILD)/bench/before/installed:
	@rm -rf $(@D) $(@D)-source && mkdir -p $(@D)-source
	@commit=$$(git rev-parse --quiet --verify "refs/tags/$(BEFORE)^{commit}") || \
	commit=$$(git log -1 --format=%H^ --diff-filter=D -- bin/caramel-embedded) || commit=; \
	if [ "$$commit" ] && git archive --output=$(@D)-source.tar "$$commit"; then \
		tar -xf $(@D)-source.tar -C $(@D)-source && $(PYTHON) -m venv $(@D) && \
		$(@D)/bin/python $(PIP_INSTALL) $(CURDIR)/$(@D)-source || exit 1; \
	else echo "bench: $(BEFORE) is not in this repository's history, and so not measured"; fi
	@mkdir -p $(@D) && touch $@
