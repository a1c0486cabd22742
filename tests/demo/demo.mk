# `make demo-picture`: the README's picture of `make demo`, from a real run.

.PHONY: demo-picture

demo-picture: $(BUILD)/venv/installed $(BUILD)/caramel/installed ## the README's picture of the demo, docs/demo.svg
	@cd tests && $(CURDIR)/$(BUILD)/venv/bin/python -Es -m demo.picture ../docs/demo.svg
