# `make container`: the program in two images. Included by packaging.mk.

# podman, docker, or buildah; and more options for it, such as --isolation chroot.
CONTAINER ?= podman
CONTAINER_OPTIONS ?=
CONTAINER_NAME ?= caramel-embedded
CONTAINER_VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' $(ROOT)caramel_embedded/__init__.py)

.PHONY: container

container: ## two container images, one of them small: [CONTAINER=podman|docker|buildah]
	$(CONTAINER) build $(CONTAINER_OPTIONS) --file $(PACKAGING)container/Containerfile --target debian \
		--tag $(CONTAINER_NAME):$(CONTAINER_VERSION) $(ROOT)
	$(CONTAINER) build $(CONTAINER_OPTIONS) --file $(PACKAGING)container/Containerfile --target small \
		--tag $(CONTAINER_NAME):$(CONTAINER_VERSION)-small $(ROOT)
