# `make fresh`: what somebody new does first, on a Debian as debootstrap makes it; see tests/fresh/fresh.sh.

SUITE ?= trixie

.PHONY: fresh

fresh: ## `make demo` and `make test` on a new Debian, as an ordinary user: [SUITE=bookworm] (root)
	@BUILD="$(BUILD)" tests/fresh/fresh.sh "$(SUITE)"
