# zpod: `make demo` shows it, `make test` proves it, `make bench` measures it. Debian 12, root, Rust and Go.
SHELL := /bin/bash
.DELETE_ON_ERROR:

CACHE ?= $(or $(ZPOD_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/zpod)
export ZPOD_CACHE := $(CACHE)
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
export ZPOD_BIN := $(TARGET)/release/zpod
export ZPOD_GUEST_IMAGE_DIR := $(TARGET)/guest-image

.PHONY: help setup kubernetes build image demo demo-k8s test fuzz lint chart charts bench clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort | expand -t 12

setup: ## install what a build and the tests need (idempotent)
	@deploy/setup.sh

kubernetes: ## also build what the test cluster is made of: Kubernetes, its CSI sidecars, Helm
	@deploy/setup.sh kubernetes

build: setup ## zpod itself
	@cargo build --quiet --release --locked -p zpod-driver -p zpod-installer -p zpod-kubectl

image: setup ## the guest: kernel and overlay, built once and cached
	@cargo run --quiet --locked -p zpod-image -- build --out $(ZPOD_GUEST_IMAGE_DIR)

demo: build image ## a ZFS volume inside a real guest kernel, from CSI call to data that survives
	@cargo build --quiet --locked -p zpod-e2e --bins
	@$(TARGET)/debug/zpod-demo

demo-k8s: build image kubernetes ## the chart on a real control plane and kubelet: a claim and a pod with ZFS at /data
	@cargo build --quiet --locked -p zpod-e2e --bins
	@$(TARGET)/debug/zpod-demo-k8s

lint: setup ## format, clippy, shell scripts
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features --locked -- -D warnings
	shellcheck -x $$(git ls-files '*.sh') .ci/run

chart: kubernetes ## the Helm chart: is what is generated up to date, what does its schema take, by Helm 4 and 3
	deploy/charts.sh check

charts: kubernetes ## write what is generated of the chart: definitions, README, plain manifests
	deploy/charts.sh generate

# Programs as they are built for their own tests: an optimized build of all of it is for what measures.
test: export ZPOD_BIN := $(TARGET)/debug/zpod
test: lint chart image ## everything: lint, chart, unit, property, csi-sanity, crash, e2e in real guests and a cluster
	cargo test --no-fail-fast --locked --workspace --exclude zpod-e2e --features zpod-driver/crash-points
	cargo build --quiet --locked -p zpod-driver -p zpod-installer -p zpod-kubectl
	cargo test --no-fail-fast --locked -p zpod-e2e

fuzz: setup ## ten minutes of CSI calls by chance, with kills and full disks; make test has half a minute of it
	ZPOD_FUZZ_SECONDS=$${ZPOD_FUZZ_SECONDS:-600} cargo test --locked -p zpod-driver --features crash-points --test fuzz_csi -- --nocapture

bench: build image kubernetes ## measure; tables on the terminal, JSON in bench-results/
	cargo bench --locked -p zpod-e2e

clean: ## what was built, but not the cache
	cargo clean
