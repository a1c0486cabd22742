################################################################################
#
# caramel-embedded
#
################################################################################

CARAMEL_EMBEDDED_VERSION = 2.0.0
# The checkout that this tree is a folder of.
CARAMEL_EMBEDDED_SITE = $(BR2_EXTERNAL_CARAMEL_EMBEDDED_PATH)/..
CARAMEL_EMBEDDED_SITE_METHOD = local
CARAMEL_EMBEDDED_OVERRIDE_SRCDIR_RSYNC_EXCLUSIONS = --exclude /build
CARAMEL_EMBEDDED_LICENSE = Apache-2.0 or MIT
CARAMEL_EMBEDDED_LICENSE_FILES = LICENSE-APACHE LICENSE-MIT
CARAMEL_EMBEDDED_SETUP_TYPE = setuptools
CARAMEL_EMBEDDED_SETTINGS_FILE = $(@D)/buildroot.conf
CARAMEL_EMBEDDED_ENV = CARAMEL_BAKE=$(CARAMEL_EMBEDDED_SETTINGS_FILE)

# Where a setting is on somebody's screen: bake.py says it behind the
# setting's own name when it has to complain.
CARAMEL_EMBEDDED_TERMS = \
	CARAMEL_CA=BR2_PACKAGE_CARAMEL_EMBEDDED_SERVER \
	CARAMEL_CA_CERT=BR2_PACKAGE_CARAMEL_EMBEDDED_CA_CERT \
	CARAMEL_INTERFACES=BR2_PACKAGE_CARAMEL_EMBEDDED_INTERFACES \
	CARAMEL_KEY_FILE=BR2_PACKAGE_CARAMEL_EMBEDDED_KEY_FILE

ifeq ($(BR2_PACKAGE_CARAMEL_EMBEDDED_KEYS_TPM),y)
CARAMEL_EMBEDDED_KEYS = tpm
CARAMEL_EMBEDDED_KEYS_SETTINGS = \
	CARAMEL_KEY_COMMAND=/usr/libexec/caramel-embedded/tpm-key \
	CARAMEL_OPENSSL_CONF=/usr/share/caramel-embedded/openssl-tpm.cnf
else ifeq ($(BR2_PACKAGE_CARAMEL_EMBEDDED_KEYS_PKCS11),y)
CARAMEL_EMBEDDED_KEYS = pkcs11
endif

CARAMEL_EMBEDDED_MORE_SETTINGS = \
	$(call qstrip,$(BR2_PACKAGE_CARAMEL_EMBEDDED_SETTINGS))

ifeq ($(BR2_PACKAGE_CARAMEL_EMBEDDED)$(BR_BUILDING),yy)
ifeq ($(call qstrip,$(BR2_PACKAGE_CARAMEL_EMBEDDED_SERVER)),)
$(error No Caramel server. Check your BR2_PACKAGE_CARAMEL_EMBEDDED_SERVER setting)
endif
ifeq ($(call qstrip,$(BR2_PACKAGE_CARAMEL_EMBEDDED_CA_CERT)),)
$(error No CA certificate. Check your BR2_PACKAGE_CARAMEL_EMBEDDED_CA_CERT setting)
endif
endif

# Values of string options have double quotes around them, which is how the
# program's settings want them. An empty one is not a setting.
define CARAMEL_EMBEDDED_WRITE_SETTINGS
	printf '%s\n' $(CARAMEL_EMBEDDED_KEYS_SETTINGS) | \
		cat - $(if $(CARAMEL_EMBEDDED_MORE_SETTINGS),"$(CARAMEL_EMBEDDED_MORE_SETTINGS)") \
		>$(CARAMEL_EMBEDDED_SETTINGS_FILE)
	{ \
		echo; \
		$(foreach t,$(CARAMEL_EMBEDDED_TERMS), \
			printf '%s\n' '$(firstword $(subst =, ,$(t)))=$(subst ','\'',$($(lastword $(subst =, ,$(t)))))'; \
			printf '%s\n' '#: $(subst =, = ,$(t))';) \
	} | sed '/^[A-Z_]*=""$$/d' >>$(CARAMEL_EMBEDDED_SETTINGS_FILE)
	$(HOST_DIR)/bin/python3 -B $(@D)/packaging/bake.py \
		--conf $(CARAMEL_EMBEDDED_SETTINGS_FILE) \
		--require CARAMEL_CA --require CARAMEL_CA_CERT $(@D)/.settings-checked
endef
CARAMEL_EMBEDDED_PRE_BUILD_HOOKS += CARAMEL_EMBEDDED_WRITE_SETTINGS

# What takes nothing from the environment where /bin/sh is Bash.
CARAMEL_EMBEDDED_SH = \
	$(if $(BR2_SYSTEM_BIN_SH_BASH),bash)$(if $(BR2_SYSTEM_BIN_SH_DASH),dash)

define CARAMEL_EMBEDDED_MAKE_INSTALL
	$(TARGET_MAKE_ENV) $(MAKE) -f $(@D)/packaging/packaging.mk \
		DESTDIR=$(TARGET_DIR) INSTALL="$(INSTALL)" \
		TARGET_SH=$(CARAMEL_EMBEDDED_SH) install-$(1)
endef

ifneq ($(CARAMEL_EMBEDDED_KEYS),)
define CARAMEL_EMBEDDED_INSTALL_KEYS
	$(call CARAMEL_EMBEDDED_MAKE_INSTALL,keys-$(CARAMEL_EMBEDDED_KEYS))
endef
CARAMEL_EMBEDDED_POST_INSTALL_TARGET_HOOKS += CARAMEL_EMBEDDED_INSTALL_KEYS
endif

ifneq ($(CARAMEL_EMBEDDED_SH),)
define CARAMEL_EMBEDDED_STARTER_FOR_SH
	$(SED) '1s|^#!/bin/sh$$|& -p|' $(TARGET_DIR)/usr/bin/caramel-embedded
endef
CARAMEL_EMBEDDED_POST_INSTALL_TARGET_HOOKS += CARAMEL_EMBEDDED_STARTER_FOR_SH
endif

ifeq ($(BR2_PACKAGE_CARAMEL_EMBEDDED_START_INIT_SCRIPT),y)
define CARAMEL_EMBEDDED_INSTALL_INIT_SYSV
	$(call CARAMEL_EMBEDDED_MAKE_INSTALL,sysv)
endef
endif

ifeq ($(BR2_PACKAGE_CARAMEL_EMBEDDED_START_TIMER),y)
define CARAMEL_EMBEDDED_INSTALL_INIT_SYSTEMD
	$(call CARAMEL_EMBEDDED_MAKE_INSTALL,systemd)
endef
endif

$(eval $(python-package))
