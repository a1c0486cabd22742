# `make release`: what is handed out of a version, into build/release/. Needs git, Debian's packaging tools and Python 3.11.

.PHONY: release

release: $(BUILD)/release-tools/installed ## wheels, sdists, Debian packages, the one-file program, SBOMs and checksums, of the last commit
	@"$(BUILD)/release-tools/bin/python" -B packaging/release.py --build "$(BUILD)"

$(BUILD)/release-tools/installed: packaging/release.txt
	@$(PYTHON) -m venv "$(@D)"
	@"$(@D)/bin/python" -m pip install --quiet --disable-pip-version-check --constraint $< build cyclonedx-bom
	@touch $@
