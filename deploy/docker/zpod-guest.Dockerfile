# syntax=docker/dockerfile:1.7
# zpod-installer, and what it puts on the nodes: the guest's kernel and the overlay of its initrd.
#
#   make image
#   docker build -f deploy/docker/zpod-guest.Dockerfile --build-context guest=target/guest-image \
#       -t ghcr.io/zpod/zpod-guest:0.1.0 .
#
# It contains Linux and OpenZFS, so the project hands out this recipe and no image: docs/licences.md.
FROM rust:1.95.0-slim-bookworm AS build
WORKDIR /src
COPY . .
# Naming the target keeps the flags away from build scripts.
ENV RUSTFLAGS="-C target-feature=+crt-static"
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --profile dist --locked --target x86_64-unknown-linux-gnu -p zpod-installer \
    && install -s -D -t /out target/x86_64-unknown-linux-gnu/dist/zpod-installer

FROM scratch
LABEL org.opencontainers.image.title="zpod-guest" \
      org.opencontainers.image.description="Kernel and initrd overlay of zpod's Kata guests, and their installer"
COPY --from=build /out/ /
COPY --from=guest vmlinuz overlay.cpio.zst manifest.json /guest/
