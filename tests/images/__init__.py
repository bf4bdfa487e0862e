"""The images of deploy/images, made in chroots of Debian: `make test-images`, apart from `make test`."""
