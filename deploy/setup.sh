#!/usr/bin/env bash
# Installs what zpod's build, tests and demo need on Debian 12 with Rust and Go.
#
#   sudo deploy/setup.sh
#
# Idempotent, and under a second when everything is there. Debian packages come
# from the mirror this machine already uses (bookworm-backports is enabled with
# main and contrib when it isn't); the two tools Debian doesn't have go into
# the cache directory, $ZPOD_CACHE or ~/.cache/zpod.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=versions.env
. "$here/versions.env"
cache=${ZPOD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/zpod}
backports=$ZPOD_DEBIAN_RELEASE-backports
# Where this script's own apt source goes.
source_file=/etc/apt/sources.list.d/zpod-backports.list

# From the release: a static shell for test guests, the image build, the backings.
packages=(
  btrfs-progs busybox-static ca-certificates debian-archive-keyring fdisk gcc
  git jq libc6-dev make mmdebstrap pkg-config shellcheck util-linux xfsprogs zstd
)
# From backports: the release's QEMU 7.2 is older than what the e2e tests use.
backported=(qemu-system-x86 qemu-utils)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# True if version $1 is at least $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n1)" = "$2" ]; }

check_machine() {
  local id='' version=''
  [ -r /etc/os-release ] && {
    id=$(. /etc/os-release && printf '%s' "$ID")
    version=$(. /etc/os-release && printf '%s' "${VERSION_CODENAME:-}")
  }
  [ "$id/$version" = "debian/$ZPOD_DEBIAN_RELEASE" ] ||
    die "this is ${id:-unknown} ${version:-}, not Debian $ZPOD_DEBIAN_RELEASE: the guest is built from that release's packages"
  [ "$(uname -m)" = x86_64 ] || die "this is $(uname -m): only x86_64 is supported so far"
  command -v cargo >/dev/null || die "cargo is missing: install Rust $ZPOD_RUST_MIN_VERSION or later (https://rustup.rs)"
  command -v go >/dev/null || die "go is missing: install Go $ZPOD_GO_MIN_VERSION or later (https://go.dev/dl)"
  local rust go
  rust=$(rustc --version | cut -d' ' -f2)
  go=$(go env GOVERSION)
  at_least "$rust" "$ZPOD_RUST_MIN_VERSION" || die "Rust $rust is too old: $ZPOD_RUST_MIN_VERSION or later"
  at_least "${go#go}" "$ZPOD_GO_MIN_VERSION" || die "$go is too old: $ZPOD_GO_MIN_VERSION or later"
}

# Enabled apt sources as lines "SUITE URI COMPONENT", whichever of its formats
# they are configured in; only those whose package lists have been fetched.
apt_sources() {
  # shellcheck disable=SC2016 # apt fills these in, not the shell
  apt-get indextargets --format '$(RELEASE) $(REPO_URI) $(COMPONENT)' 'Created-By: Packages'
}

# apt keeps lists of enabled sources only, and looking for the files takes no
# time where asking apt takes a second.
backports_enabled() {
  compgen -G "/var/lib/apt/lists/*_${backports}_main_binary-amd64_Packages*" >/dev/null &&
    compgen -G "/var/lib/apt/lists/*_${backports}_contrib_binary-amd64_Packages*" >/dev/null
}

enable_backports() {
  local line uri keyring=/usr/share/keyrings/debian-archive-keyring.gpg
  line=$(apt_sources | grep -E "^$ZPOD_DEBIAN_RELEASE .* main\$") ||
    die "apt has no source for $ZPOD_DEBIAN_RELEASE main: add your Debian mirror to /etc/apt/sources.list"
  uri=$(cut -d' ' -f2 <<<"${line%%$'\n'*}")
  # Name the key as the machine's own sources do: apt refuses a suite that two
  # sources sign differently.
  grep -qrs "$keyring" /etc/apt/sources.list /etc/apt/sources.list.d || keyring=''
  say "enabling $backports main contrib from $uri"
  printf 'deb%s %s %s main contrib\n' "${keyring:+ [signed-by=$keyring]}" "$uri" "$backports" >"$source_file.new"
  mv "$source_file.new" "$source_file"
  apt-get update -q
}

# The given packages that are not installed.
missing() {
  local package
  for package in "$@"; do
    grep -Fxq "$package" <<<"$installed" || printf '%s\n' "$package"
  done
}

install_packages() {
  local from_release from_backports
  installed=$(dpkg-query -W -f='${db:Status-Status} ${binary:Package}\n' | sed -n 's/^installed \([^:]*\).*/\1/p')
  mapfile -t from_release < <(missing "${packages[@]}")
  mapfile -t from_backports < <(missing "${backported[@]}")
  local qemu
  qemu=$(dpkg-query -W -f='${Version}' qemu-system-x86 2>/dev/null || true)
  at_least "${qemu#*:}" "$ZPOD_QEMU_MIN_VERSION" || from_backports=("${backported[@]}")

  export DEBIAN_FRONTEND=noninteractive
  # A new machine or container may have its sources but no package lists yet.
  backports_enabled || apt-get update -q
  backports_enabled || enable_backports
  if [ ${#from_release[@]} -gt 0 ]; then
    say "installing ${from_release[*]}"
    apt-get install -q -y --no-install-recommends "${from_release[@]}"
  fi
  if [ ${#from_backports[@]} -gt 0 ]; then
    say "installing from $backports: ${from_backports[*]}"
    apt-get install -q -y --no-install-recommends -t "$backports" "${from_backports[@]}"
  fi
}

# Tools in the cache are kept by version, so that a new version is a new path;
# $cache/bin has the current ones.
tool() {
  local name=$1 version=$2 place
  shift 2
  place=$cache/tools/$name-$version
  if [ ! -x "$place/bin/$name" ]; then
    say "building $name $version"
    rm -rf "$place.partial"
    mkdir -p "$place.partial/bin"
    "$@" "$place.partial"
    rm -rf "$place"
    mv "$place.partial" "$place"
  fi
  [ "$(readlink "$cache/bin/$name" || true)" = "$place/bin/$name" ] || ln -sfn "$place/bin/$name" "$cache/bin/$name"
}

build_vsock() {
  cargo install vhost-device-vsock --version "$ZPOD_VHOST_DEVICE_VSOCK_VERSION" --locked --quiet --root "$1"
}

build_sanity() {
  GOBIN=$1/bin GOFLAGS='' go install "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$ZPOD_CSI_SANITY_VERSION"
}

check_machine
if [ "$(id -u)" -ne 0 ]; then die 'run this as root: it installs Debian packages'; fi
mkdir -p "$cache/bin"
exec 9>"$cache/.setup.lock"
flock 9
install_packages
# Neither may inherit the lock: a build server left behind would hold it.
tool vhost-device-vsock "$ZPOD_VHOST_DEVICE_VSOCK_VERSION" build_vsock 9>&-
tool csi-sanity "$ZPOD_CSI_SANITY_VERSION" build_sanity 9>&-
say "ready; tools are in $cache/bin"
