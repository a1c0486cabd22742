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

# For make zipapp: where Python is on the device, and the file to make.
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
	--term CARAMEL_CA=SERVER= --term CARAMEL_CA_CERT=CA_CERT=

.PHONY: zipapp install install-program install-extras install-systemd install-sysv install-none deb device-test

zipapp: $(if $(filter $(BUILD)/zipapp,$(PACKAGES)),$(BUILD)/zipapp/installed) ## one executable file for an image: CA_CERT=ca.pem SERVER=host[:port] [CONF=more.conf] [OUT=file]
	@$(PYTHON) -B "$(PACKAGING)pyz.py" --output "$(OUT)" --python "$(TARGET_PYTHON)" --packages "$(PACKAGES)" \
		$(if $(CONF),--conf "$(CONF)") $(if $(SERVER),--server "$(SERVER)") $(if $(CA_CERT),--ca-cert "$(CA_CERT)")

# Sources only: what is compiled is compiled for the archive.
$(BUILD)/zipapp/installed: $(PACKAGING)zipapp.txt
	@rm -rf "$(@D)"
	@$(PYTHON) -m venv "$(BUILD)/zipapp-pip"
	@"$(BUILD)/zipapp-pip/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-compile \
		--only-binary :all: --target "$(@D)" -r $<
	@touch $@

install: install-program install-extras install-$(INIT) ## into an image: DESTDIR= [CONF=firmware.conf] [INIT=systemd|sysv|none]

# First what can fail, so that a bad setting leaves no half of an installation.
install-program:
	@case "$(INIT)" in systemd|sysv|none) ;; *) \
		echo "make install: INIT=$(INIT) is none of systemd, sysv, none" >&2; exit 1;; esac
	@$(BAKE) "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded"
	$(INSTALL) -m 0644 $(ROOT)caramel_embedded/*.py "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded/"
	test ! -e $(ROOT)caramel_embedded/py.typed || \
		$(INSTALL) -m 0644 $(ROOT)caramel_embedded/py.typed "$(DESTDIR)$(PYTHON_DIR)/caramel_embedded/"
	$(INSTALL) -D -m 0755 $(PACKAGING)starter/caramel-embedded "$(DESTDIR)$(PREFIX)/bin/caramel-embedded"

# COMPILE=no where the image is for another version of Python than this machine's.
ifneq ($(COMPILE),no)
	$(PYTHON) -m compileall -q -f --invalidation-mode unchecked-hash -d "$(PYTHON_DIR)/caramel_embedded" \
		"$(DESTDIR)$(PYTHON_DIR)/caramel_embedded"
endif

install-extras:
	$(INSTALL) -D -m 0644 $(PACKAGING)man/caramel-embedded.8 "$(DESTDIR)$(PREFIX)/share/man/man8/caramel-embedded.8"
	$(INSTALL) -D -m 0644 $(PACKAGING)completion/caramel-embedded.bash \
		"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/caramel-embedded"
	$(INSTALL) -D -m 0644 $(PACKAGING)caramel-embedded.conf \
		"$(DESTDIR)$(PREFIX)/share/doc/caramel-embedded/examples/caramel-embedded.conf"

# The paths in the units and scripts are those of a system installation.
install-libexec:
	$(INSTALL) -d "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded"
	for script in until-enrolled until-certified keep-enrolled; do \
		sed 's#/usr/bin/caramel-embedded#$(PREFIX)/bin/caramel-embedded#' "$(PACKAGING)libexec/$$script" \
			>"$(DESTDIR)$(PREFIX)/libexec/caramel-embedded/$$script" && \
		chmod 0755 "$(DESTDIR)$(PREFIX)/libexec/caramel-embedded/$$script" || exit 1; done

install-systemd: install-libexec
	$(INSTALL) -d "$(DESTDIR)$(UNITDIR)"
	for unit in $(UNITS); do \
		sed 's#/usr/\(bin\|libexec\)/#$(PREFIX)/\1/#' "$(PACKAGING)systemd/$$unit" >"$(DESTDIR)$(UNITDIR)/$$unit" && \
		chmod 0644 "$(DESTDIR)$(UNITDIR)/$$unit" || exit 1; done
	for example in needs-certificate instance-own-user; do \
		$(INSTALL) -D -m 0644 "$(PACKAGING)systemd/examples/$$example.conf" \
			"$(DESTDIR)$(PREFIX)/share/doc/caramel-embedded/examples/$$example.conf" || exit 1; done

install-sysv: install-libexec
	$(INSTALL) -d "$(DESTDIR)$(SYSCONFDIR)/init.d"
	sed 's#/usr/libexec/#$(PREFIX)/libexec/#' $(ROOT)buildroot/package/caramel-embedded/S95caramel-embedded \
		>"$(DESTDIR)$(SYSCONFDIR)/init.d/S95caramel-embedded"
	chmod 0755 "$(DESTDIR)$(SYSCONFDIR)/init.d/S95caramel-embedded"

install-none:

deb: ## the Debian package, into build/: [CARAMEL_BAKE=/path/to/firmware.conf]
	@BUILD="$(BUILD)" "$(PACKAGING)deb.sh"

device-test: $(BUILD)/tests/installed $(BUILD)/caramel/installed ## a Debian armhf tree under qemu that boots the init script and enrolls (root, some minutes)
	@BUILD="$(BUILD)" PYTHON="$(PYTHON)" "$(ROOT)tests/device/device-test.sh"

-include $(PACKAGING)container/container.mk
