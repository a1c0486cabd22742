SUMMARY = "Gets the device's certificate from a Caramel server and keeps it fresh"
DESCRIPTION = "At the first boot the device makes a private key, posts a signing request to a Caramel server and \
fetches the certificate once it is signed; after that it looks for a newer one every hour. One file holds key and \
certificate for the programs on the device to use."
SECTION = "net"
LICENSE = "MIT | Apache-2.0"
LIC_FILES_CHKSUM = "file://${COMMON_LICENSE_DIR}/MIT;md5=0835ade698e0bcf8506ecda2f7b4f302 \
    file://${COMMON_LICENSE_DIR}/Apache-2.0;md5=89aea4e17d99a7cacdbeed46a0096b10"

# What local.conf or a distribution sets; the first two have no default.
CARAMEL_EMBEDDED_SERVER ?= ""
CARAMEL_EMBEDDED_CA_CERT ?= ""
CARAMEL_EMBEDDED_INTERFACES ?= ""
CARAMEL_EMBEDDED_KEY_FILE ?= ""
# Where the private key is: empty (in the key file), "tpm" or "pkcs11", see docs/keys-in-hardware.md.
CARAMEL_EMBEDDED_KEYS ?= ""
# File with NAME=value lines for any other setting of caramel-embedded(8).
CARAMEL_EMBEDDED_SETTINGS ?= ""
# What /bin/sh is in the image: bash where IMAGE_INSTALL brings it, which then replaces BusyBox's; dash; or nothing.
CARAMEL_EMBEDDED_SH ?= ""
export TARGET_SH = "${CARAMEL_EMBEDDED_SH}"

# The checkout that this layer is a folder of. Only what is installed is listed, so that nothing else causes a rebuild.
FILESEXTRAPATHS:prepend := "${THISDIR}/../../../../..:"
CARAMEL_EMBEDDED_SOURCES = "setup.py setup.cfg caramel_embedded packaging buildroot"
SRC_URI = "${@' '.join('file://%s;subdir=${BP}' % name for name in d.getVar('CARAMEL_EMBEDDED_SOURCES').split())}"

inherit setuptools3 systemd update-rc.d

export CARAMEL_BAKE = "${B}/yocto.conf"

# The build's time is the device's clock floor; bitbake sets SOURCE_DATE_EPOCH for every recipe.
do_compile[file-checksums] += "${@caramel_embedded_files(d)}"
do_compile[prefuncs] += "caramel_embedded_settings"

def caramel_embedded_files(d):
    names = ("CARAMEL_EMBEDDED_CA_CERT", "CARAMEL_EMBEDDED_SETTINGS")
    return " ".join("%s:True" % d.getVar(name) for name in names if d.getVar(name))

# The recipe is skipped rather than failed, so that the layer does no harm to a build that doesn't want it. bitbake says
# why when somebody asks for it.
python () {
    import os

    for name, what in (("CARAMEL_EMBEDDED_SERVER", "the Caramel server"), ("CARAMEL_EMBEDDED_CA_CERT", "the CA's PEM file")):
        if not d.getVar(name):
            raise bb.parse.SkipRecipe("%s is not set: name %s in local.conf" % (name, what))
    if d.getVar("CARAMEL_EMBEDDED_KEYS") not in ("", "tpm", "pkcs11"):
        raise bb.parse.SkipRecipe("CARAMEL_EMBEDDED_KEYS is none of tpm, pkcs11")
    for name in ("CARAMEL_EMBEDDED_CA_CERT", "CARAMEL_EMBEDDED_SETTINGS"):
        path = d.getVar(name)
        if path and not os.path.isabs(path):
            raise bb.parse.SkipRecipe("%s: %s must be an absolute path, such as ${TOPDIR}/%s" % (name, path, path))
}

# The settings in the program's own format, and what each is called here, for packaging/bake.py to say when one is wrong.
python caramel_embedded_settings() {
    lines = []
    if d.getVar("CARAMEL_EMBEDDED_KEYS") == "tpm":
        lines.append(d.expand("CARAMEL_KEY_COMMAND=${libexecdir}/caramel-embedded/tpm-key"))
        lines.append(d.expand("CARAMEL_OPENSSL_CONF=${datadir}/caramel-embedded/openssl-tpm.cnf"))
    more = d.getVar("CARAMEL_EMBEDDED_SETTINGS")
    if more:
        try:
            with open(more, encoding="utf-8") as file:
                lines.append(file.read())
        except OSError as error:
            bb.fatal("CARAMEL_EMBEDDED_SETTINGS: %s: %s" % (more, error.strerror))
    for name, setting in (
        ("CARAMEL_EMBEDDED_SERVER", "CARAMEL_CA"),
        ("CARAMEL_EMBEDDED_CA_CERT", "CARAMEL_CA_CERT"),
        ("CARAMEL_EMBEDDED_INTERFACES", "CARAMEL_INTERFACES"),
        ("CARAMEL_EMBEDDED_KEY_FILE", "CARAMEL_KEY_FILE"),
    ):
        if d.getVar(name):
            lines.append('#: %s = %s\n%s="%s"' % (setting, name, setting, d.getVar(name)))
    bb.utils.mkdirhier(d.getVar("B"))
    with open(d.getVar("CARAMEL_BAKE"), "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
}

do_install:append() {
    if [ -n "${CARAMEL_EMBEDDED_SH}" ]; then
        sed -i -e '1s|^#!/bin/sh$|& -p|' ${D}${bindir}/caramel-embedded
    fi
    oe_runmake -f ${S}/packaging/packaging.mk DESTDIR=${D} PREFIX=${prefix} UNITDIR=${systemd_system_unitdir} \
        SYSCONFDIR=${sysconfdir} install-extras
    oe_runmake -f ${S}/packaging/packaging.mk DESTDIR=${D} PREFIX=${prefix} KEYS=${CARAMEL_EMBEDDED_KEYS} install-keys
    if ${@bb.utils.contains('DISTRO_FEATURES', 'systemd', 'true', 'false', d)}; then
        oe_runmake -f ${S}/packaging/packaging.mk DESTDIR=${D} PREFIX=${prefix} UNITDIR=${systemd_system_unitdir} \
            install-systemd
    fi
    if ${@bb.utils.contains('DISTRO_FEATURES', 'sysvinit', 'true', 'false', d)}; then
        oe_runmake -f ${S}/packaging/packaging.mk DESTDIR=${D} PREFIX=${prefix} SYSCONFDIR=${sysconfdir} install-sysv
        mv ${D}${sysconfdir}/init.d/S95caramel-embedded ${D}${sysconfdir}/init.d/caramel-embedded
    fi
}

SYSTEMD_SERVICE:${PN} = "caramel-embedded.timer caramel-embedded-boot.timer"
INITSCRIPT_NAME = "caramel-embedded"
INITSCRIPT_PARAMS = "start 95 2 3 4 5 . stop 05 0 1 6 ."

FILES:${PN} += "${systemd_system_unitdir} ${libexecdir} ${datadir}/bash-completion ${datadir}/caramel-embedded"

RDEPENDS:${PN} += " \
    python3-codecs \
    python3-core \
    python3-cryptography \
    python3-datetime \
    python3-email \
    python3-fasteners \
    python3-fcntl \
    python3-io \
    python3-json \
    python3-logging \
    python3-netclient \
    python3-pyopenssl \
    python3-shell \
    python3-syslog \
    python3-threading \
    python3-urllib3 \
    ${@caramel_embedded_keys(d)} \
"

# From meta-tpm of meta-security, and meta-oe.
def caramel_embedded_keys(d):
    return {
        "tpm": "openssl-bin tpm2-openssl tpm2-tools libtss2-tcti-device",
        "pkcs11": "openssl-bin pkcs11-provider opensc",
    }.get(d.getVar("CARAMEL_EMBEDDED_KEYS"), "")
