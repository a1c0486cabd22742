# What goes into an image: the files of an installation, the one-file program, the Debian package. Included by the Makefile;
# also works by itself (make -f packaging/packaging.mk install), with nothing but make and Python's standard library.

PYTHON ?= python3
BUILD ?= build
PREFIX ?= /usr
SYSCONFDIR ?= /etc
UNITDIR ?= $(PREFIX)/lib/systemd/system
INSTALL ?= install

# What starts the checks on the target: systemd, sysv (BusyBox and other init scripts) or none.
INIT ?= systemd

# What /bin/sh is on the target: bash or dash, where it is one of them. Their scripts then begin with "#!/bin/sh -p", with
# which Bash takes nothing from the environment: with SHELLOPTS=noexec there, every script would end with 0. BusyBox
# doesn't know -p.
TARGET_SH ?=
FIRST_LINE = $(if $(TARGET_SH),-e '1s|^\#!/bin/sh$$|& -p|')

# Where the private key is: empty (in the key file), tpm or pkcs11. For a TPM it also sets what the program needs; for a
# token CONF has to name the command with its arguments, and OpenSSL's configuration.
KEYS ?=

# For make zipapp: where Python is on the device, and the file to make. BARE=yes for one without a firmware's settings,
# which then are in the device's configuration file.
TARGET_PYTHON ?= /usr/bin/python3
OUT ?= $(BUILD)/caramel-embedded.pyz

# For make zipapp: the folder with urllib3 and fasteners in it, as pip install --target makes it. By default it is made,
# with the releases of packaging/zipapp.txt.
PACKAGES ?= $(BUILD)/zipapp

PACKAGING := $(dir $(lastword $(MAKEFILE_LIST)))
ROOT := $(patsubst %packaging/,%,$(PACKAGING))
ROOT := $(if $(ROOT),$(ROOT),./)

# Where Python on the target looks for packages; that of this machine's Python unless it is given.
PYTHON_DIR ?= $(shell $(PYTHON) -c 'import sys, sysconfig; \
	names = sysconfig.get_scheme_names(); \
	scheme = "deb_system" if "deb_system" in names and sys.argv[1] == "/usr" else "posix_prefix"; \
	print(sysconfig.get_path("purelib", scheme, {"base": sys.argv[1]}))' '$(PREFIX)')

UNITS := caramel-embedded.service caramel-embedded.timer caramel-embedded-boot.timer \
	caramel-embedded-certificate.service caramel-embedded@.service caramel-embedded@.timer \
	caramel-embedded-certificate@.service

# The firmware's settings: SERVER= and CA_CERT=, in front of the file that CONF= or CARAMEL_BAKE names.
BAKE = $(PYTHON) -B "$(PACKAGING)bake.py" $(if $(CONF),--conf "$(CONF)") \
	$(if $(SERVER),--set "CARAMEL_CA=$(SERVER)") $(if $(CA_CERT),--set "CARAMEL_CA_CERT=$(CA_CERT)") \
	$(if $(filter tpm,$(KEYS)),--set "CARAMEL_KEY_COMMAND=$(PREFIX)/libexec/caramel-embedded/tpm-key" \
		--set "CARAMEL_OPENSSL_CONF=$(PREFIX)/share/caramel-embedded/openssl-tpm.cnf") \
	--term CARAMEL_CA=SERVER= --term CARAMEL_CA_CERT=CA_CERT=

.PHONY: zipapp install install-where install-program install-extras install-libexec install-systemd install-sysv \
	install-none install-keys install-keys-tpm install-keys-pkcs11 uninstall deb device-test

zipapp: $(if $(filter $(BUILD)/zipapp,$(PACKAGES)),$(BUILD)/zipapp/installed) ## one executable file for an image: CA_CERT=ca.pem SERVER=host[:port] [CONF=more.conf] [OUT=file]
	@$(PYTHON) -B "$(PACKAGING)pyz.py" --output "$(OUT)" --python "$(TARGET_PYTHON)" --sh "$(TARGET_SH)" --packages "$(PACKAGES)" \
		$(if $(CONF),--conf "$(CONF)") $(if $(SERVER),--server "$(SERVER)") $(if $(CA_CERT),--ca-cert "$(CA_CERT)") \
		$(if $(BARE),--bare)

# Sources only: what is compiled is compiled for the archive.
$(BUILD)/zipapp/installed: $(PACKAGING)zipapp.txt
	@rm -rf "$(@D)"
	@$(PYTHON) -m venv "$(BUILD)/zipapp-pip"
	@"$(BUILD)/zipapp-pip/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
		--only-binary :all: --target "$(@D)" -r $<
	@touch $@

install: install-program install-extras install-$(INIT) install-keys ## into an image: DESTDIR= [CONF=firmware.conf] [INIT=systemd|sysv|none] [KEYS=tpm|pkcs11] [TARGET_SH=bash|dash]

# What is meant for an image must not land in the machine that builds it. Whoever means this machine says DESTDIR=/.
install-where:
	@test -n "$(DESTDIR)" || { echo "make $(or $(MAKECMDGOALS),install): DESTDIR= is not set: name the root folder of the" \
		"image, or this machine with DESTDIR=/" >&2; exit 1; }
	@case "$(INIT)" in systemd|sysv|none) ;; *) \
		echo "make install: INIT=$(INIT) is none of systemd, sysv, none" >&2; exit 1;; esac
	@case "$(KEYS)" in ''|tpm|pkcs11) ;; *) \
		echo "make install: KEYS=$(KEYS) is none of tpm, pkcs11" >&2; exit 1;; esac
	@case "$(TARGET_SH)" in ''|bash|dash) ;; *) \
		echo "make install: TARGET_SH=$(TARGET_SH) is none of bash, dash; leave it out for another shell" >&2; exit 1;; esac

# A script, with the shell of the target and the paths of this installation. $(call script,from,to)
PATHS = -e 's,/usr/\(bin/caramel-embedded\|libexec/\),$(PREFIX)/\1,'
script = sed $(FIRST_LINE) $(PATHS) "$(1)" >"$(DESTDIR)$(2)" && chmod 0755 "$(DESTDIR)$(2)"

# First what can fail, so that a bad setting leaves no half of an installation.
install-program: install-where
	@$(BAKE) "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded"
	$(INSTALL) -m 0644 $(ROOT)caramel_embedded/*.py "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded/"
	test ! -e $(ROOT)caramel_embedded/py.typed || \
		$(INSTALL) -m 0644 $(ROOT)caramel_embedded/py.typed "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded/"
	$(INSTALL) -d "$(DESTDIR)$(PREFIX)/bin"
	$(call script,$(PACKAGING)starter/caramel-embedded,$(PREFIX)/bin/caramel-embedded)

# COMPILE=no where the image is for another version of Python than this machine's.
ifneq ($(COMPILE),no)
	$(PYTHON) -m compileall -q -f --invalidation-mode unchecked-hash -d "$(PYTHON_DIR)/caramel_embedded" \
		"$(DESTDIR)$(PYTHON_DIR)/caramel_embedded"
endif

install-extras: install-where
	$(INSTALL) -D -m 0644 $(PACKAGING)man/caramel-embedded.8 "$(DESTDIR)$(PREFIX)/share/man/man8/caramel-embedded.8"
	$(INSTALL) -D -m 0644 $(PACKAGING)completion/caramel-embedded.bash \
		"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/caramel-embedded"
	$(INSTALL) -D -m 0644 $(PACKAGING)caramel-embedded.conf \
		"$(DESTDIR)$(PREFIX)/share/doc/caramel-embedded/examples/caramel-embedded.conf"

LIBEXEC := until-enrolled until-certified keep-enrolled

install-libexec: install-where
	$(INSTALL) -d "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded"
	$(INSTALL) -m 0644 $(PACKAGING)libexec/chance "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded/chance"
	for script in $(LIBEXEC); do \
		$(call script,$(PACKAGING)libexec/$$script,$(PREFIX)/libexec/caramel-embedded/$$script) || exit 1; done

install-systemd: install-libexec
	$(INSTALL) -d "$(DESTDIR)$(UNITDIR)"
	for unit in $(UNITS); do \
		sed $(PATHS) "$(PACKAGING)systemd/$$unit" >"$(DESTDIR)$(UNITDIR)/$$unit" && \
		chmod 0644 "$(DESTDIR)$(UNITDIR)/$$unit" || exit 1; done
	for example in needs-certificate instance-own-user; do \
		$(INSTALL) -D -m 0644 "$(PACKAGING)systemd/examples/$$example.conf" \
			"$(DESTDIR)$(PREFIX)/share/doc/caramel-embedded/examples/$$example.conf" || exit 1; done

install-sysv: install-libexec
	$(INSTALL) -d "$(DESTDIR)$(SYSCONFDIR)/init.d"
	$(call script,$(ROOT)buildroot/package/caramel-embedded/S95caramel-embedded,$(SYSCONFDIR)/init.d/S95caramel-embedded)

install-none:

# What keys in a chip need: packaging/keys.
install-keys: $(if $(filter tpm pkcs11,$(KEYS)),install-keys-$(KEYS))

install-keys-tpm: install-where
	$(INSTALL) -d "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded"
	$(call script,$(PACKAGING)keys/tpm-key,$(PREFIX)/libexec/caramel-embedded/tpm-key)
	$(call script,$(PACKAGING)keys/tpm-parent,$(PREFIX)/libexec/caramel-embedded/tpm-parent)
	$(INSTALL) -D -m 0644 $(PACKAGING)keys/openssl-tpm.cnf "$(DESTDIR)$(PREFIX)/share/caramel-embedded/openssl-tpm.cnf"

install-keys-pkcs11: install-where
	$(INSTALL) -d "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded"
	$(call script,$(PACKAGING)keys/pkcs11-key,$(PREFIX)/libexec/caramel-embedded/pkcs11-key)
	$(INSTALL) -D -m 0644 $(PACKAGING)keys/openssl-pkcs11.cnf \
		"$(DESTDIR)$(PREFIX)/share/caramel-embedded/openssl-pkcs11.cnf"

# What any of the above has put there, with the same DESTDIR=, PREFIX= and PYTHON_DIR=. Settings and identities stay.
uninstall: install-where ## what make install has put there: DESTDIR=
	rm -rf "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded" "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded" \
		"$(DESTDIR)$(PREFIX)/share/caramel-embedded" "$(DESTDIR)$(PREFIX)/share/doc/caramel-embedded"
	rm -f "$(DESTDIR)$(PREFIX)/bin/caramel-embedded" "$(DESTDIR)$(PREFIX)/share/man/man8/caramel-embedded.8" \
		"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/caramel-embedded" \
		"$(DESTDIR)$(SYSCONFDIR)/init.d/S95caramel-embedded" $(foreach unit,$(UNITS),"$(DESTDIR)$(UNITDIR)/$(unit)")

deb: ## the Debian package, into build/: [CARAMEL_BAKE=/path/to/firmware.conf]
	@BUILD="$(BUILD)" "$(PACKAGING)deb.sh"

device-test: $(BUILD)/tests/installed $(BUILD)/caramel/installed ## a Debian armhf tree under qemu that boots the init script and enrolls (root, some minutes)
	@BUILD="$(BUILD)" PYTHON="$(PYTHON)" "$(ROOT)tests/device/device-test.sh"

-include $(PACKAGING)container/container.mk
