# `make fresh`: what somebody new does first, on a Debian as debootstrap makes it; see tests/fresh/fresh.sh.

SUITE ?= bookworm

.PHONY: fresh

fresh: ## `make demo` and `make test` on a new Debian, as an ordinary user: [SUITE=trixie] (root)
	@BUILD="$(BUILD)" tests/fresh/fresh.sh "$(SUITE)"
