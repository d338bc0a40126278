# zpod-installer, and what it puts on the nodes: the guest's kernel and the overlay of its initrd.
#
#   make image
#   docker build -f deploy/docker/zpod-guest.Dockerfile --build-context guest=target/guest-image \
#       -t REGISTRY/zpod-guest:0.1.0 .
#
# It contains Linux and OpenZFS, so the project hands out this recipe and no image: docs/licences.md.
# As in zpod.Dockerfile.
FROM rust:1.95.0-slim-bookworm@sha256:d7482085ff5b415f84dba5647ae71606650bdef00db7aeb69f4b3d170c3e4082 AS build
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
