# What the tests' world needs and no package index has.

# A device of Debian 13, because Debian 12's provider for TPMs can't do TLS: all that a key in a TPM or a token takes,
# programs that use such a key, and what plays the TPM and the token.
TRIXIE := python3 python3-venv python3-cryptography python3-fasteners python3-openssl python3-urllib3 openssl \
	tpm2-openssl tpm2-tools libtss2-tcti-device0t64 libtss2-tcti-swtpm0t64 swtpm pkcs11-provider softhsm2 opensc \
	curl gnutls-bin haproxy mosquitto mosquitto-clients nginx-light nodejs stunnel4 strace make dpkg-dev debhelper dh-python
EMPTY :=
COMMA := ,

$(BUILD)/trixie/installed: tests/world/tree.sh tests/world/world.mk
	@BUILD="$(BUILD)" tests/world/tree.sh trixie trixie $(subst $(EMPTY) $(EMPTY),$(COMMA),$(strip $(TRIXIE))) >/dev/null
	@touch $@
