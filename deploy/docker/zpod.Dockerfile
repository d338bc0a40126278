# zpod-controller and zpod-node, static, and dmsetup with its libraries, for mirrors; nothing else.
#
#   docker build -f deploy/docker/zpod.Dockerfile -t REGISTRY/zpod:0.1.0 .
# Tag and digest change together: `docker buildx imagetools inspect rust:VERSION-slim-bookworm`. This one was found where many
# independent public repositories pin the same tag, and not looked up in the registry itself.
FROM rust:1.95.0-slim-bookworm@sha256:d7482085ff5b415f84dba5647ae71606650bdef00db7aeb69f4b3d170c3e4082 AS build
WORKDIR /src
COPY . .
# Naming the target keeps the flags away from build scripts.
ENV RUSTFLAGS="-C target-feature=+crt-static"
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --profile dist --locked --target x86_64-unknown-linux-gnu -p zpod-driver \
        --bin zpod-controller --bin zpod-node \
    && install -s -D -t /out target/x86_64-unknown-linux-gnu/dist/zpod-controller \
        target/x86_64-unknown-linux-gnu/dist/zpod-node
RUN apt-get update && apt-get install -y --no-install-recommends dmsetup \
    && for file in /usr/sbin/dmsetup $(ldd /usr/sbin/dmsetup | grep -o '/lib[^ ]*'); do install -D "$file" "/out$file"; done

FROM scratch
LABEL org.opencontainers.image.title="zpod" \
      org.opencontainers.image.description="Controller and node plugin of the CSI driver csi.zpod.storage" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /out/ /
# The chart says which program. On the nodes it is root, by the chart's word.
USER 65532:65532
