# Debian's other BusyBox, which has init and crond. It can't be installed beside the usual one, so it is only unpacked.
$(BUILD)/busybox-static/bin/busybox:
	@rm -rf $(BUILD)/busybox-static && mkdir -p $(BUILD)/busybox-static
	@cd $(BUILD)/busybox-static && apt-get -o APT::Sandbox::User=root download --quiet --quiet busybox-static && dpkg-deb --extract busybox-static_*.deb .
	@touch $@
