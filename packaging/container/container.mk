# `make container`: the program in two images. Included by packaging.mk.

# podman, docker, or buildah; and more options for it, such as --isolation chroot.
IMAGE_BUILDER ?= podman
IMAGE_OPTIONS ?=
IMAGE ?= caramel-embedded
IMAGE_LABEL = org.opencontainers.image.version=$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' $(ROOT)caramel_embedded/__init__.py)

.PHONY: container

container: ## two container images, one of them small: [IMAGE_BUILDER=podman|docker|buildah]
	@command -v $(firstword $(IMAGE_BUILDER)) >/dev/null || { echo "make container: $(firstword $(IMAGE_BUILDER)) is" \
		"missing: apt-get install podman, or name what is there with IMAGE_BUILDER=docker or buildah" >&2; exit 1; }
	$(IMAGE_BUILDER) build $(IMAGE_OPTIONS) --file $(PACKAGING)container/Containerfile --target debian \
		--label "$(IMAGE_LABEL)" --tag $(IMAGE) $(ROOT)
	$(IMAGE_BUILDER) build $(IMAGE_OPTIONS) --file $(PACKAGING)container/Containerfile --target small \
		--label "$(IMAGE_LABEL)" --tag $(IMAGE):small $(ROOT)
