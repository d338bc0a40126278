#!/usr/bin/env bash
# Installs what zpod's build, tests and demo need on Debian 12 with Rust and Go.
#
#   sudo deploy/setup.sh              for the build, the demo and most tests
#   sudo deploy/setup.sh kubernetes   also Kubernetes itself, its CSI sidecars and Helm
#
# Idempotent, and under a second when everything is there. Debian packages come
# from the mirror this machine already uses (bookworm-backports is enabled with
# main and contrib when it isn't); the tools Debian doesn't have are built into
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
  btrfs-progs busybox-static ca-certificates debian-archive-keyring dmsetup fdisk
  gcc git jq libc6-dev make mmdebstrap pkg-config shellcheck udev util-linux xfsprogs zstd
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
# $cache/bin has the current ones. BUILD makes PLACE/bin, with one program or several.
#   tool NAME VERSION BUILD [ARGUMENT...]
tool() {
  local name=$1 version=$2 build=$3 place program link
  shift 3
  place=$cache/tools/$name-$version
  if [ ! -d "$place" ]; then
    say "building $name $version"
    rm -rf "$place.partial"
    mkdir -p "$place.partial/bin"
    # Not with the lock: a build server left behind would hold it.
    "$build" "$place.partial" "$@" 9>&-
    mv "$place.partial" "$place"
  fi
  for program in "$place/bin/"*; do
    link=$cache/bin/${program##*/}
    [ "$link" -ef "$program" ] || ln -sfn "$program" "$link"
  done
}

build_vsock() {
  cargo install vhost-device-vsock --version "$ZPOD_VHOST_DEVICE_VSOCK_VERSION" --locked --quiet --root "$1"
}

build_sanity() {
  GOBIN=$1/bin GOFLAGS='' go install "github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@$ZPOD_CSI_SANITY_VERSION"
}

# Programs of a Go module, static, as its authors build them. `go install` refuses a module with replace
# lines, so they are built from a module of ours that repeats those lines; where they name a directory of the
# same repository, it is that directory's published module, of SIBLINGS' version.
#   build_go PLACE MODULE VERSION SIBLINGS LDFLAGS PACKAGE...
build_go() {
  local place=$1 module=$2 version=$3 siblings=$4 ldflags=$5 theirs log=$1/build.log
  shift 5
  local -x CGO_ENABLED=0 GOFLAGS=-mod=mod GOWORK=off
  local -a same
  theirs=$(go mod download -json "$module@$version" | jq -r .GoMod)
  mapfile -t same < <(go mod edit -json "$theirs" | jq -r --arg siblings "$siblings" '
    (.Require | map(.Path)) as $required |
    "-go=\(.Go)",
    (.Replace[]? | select(.New.Version or IN(.Old.Path; $required[])) |
      "-replace=\(.Old.Path)=" + if .New.Version then "\(.New.Path)@\(.New.Version)" else "\(.Old.Path)@\($siblings)" end)')
  printf 'module zpod.storage/tools\n' >"$place/go.mod"
  go mod edit "${same[@]}" -require="$module@$version" "$place/go.mod"
  go build -C "$place" -trimpath -ldflags "-s -w $ldflags" -o bin/ "$@" 2>"$log" || {
    tail -n 20 "$log" >&2
    die "building $module $version failed"
  }
}

build_etcd() {
  local version=$ZPOD_ETCD_VERSION module=go.etcd.io/etcd/server/v3
  build_go "$1" $module "$version" "$version" '' $module
  mv "$1/bin/server" "$1/bin/etcd"
}

build_kubernetes() {
  local version=$ZPOD_KUBERNETES_VERSION minor stamp=k8s.io/component-base/version module=k8s.io/kubernetes
  minor=${version#v1.}
  # Without the stamp each would call itself v0.0.0, and charts that ask for a version would refuse it.
  stamp="-X $stamp.gitVersion=$version -X $stamp.gitMajor=1 -X $stamp.gitMinor=${minor%%.*} -X $stamp.gitTreeState=clean"
  # One build: the five have most of their packages in common. Staging modules are v0 where Kubernetes is v1.
  build_go "$1" $module "$version" "v0.$minor" "$stamp" \
    $module/cmd/kube-{apiserver,controller-manager,scheduler} $module/cmd/kube{let,ctl}
}

#   build_sidecar PLACE MODULE VERSION PROGRAM...
build_sidecar() {
  local place=$1 module=github.com/kubernetes-csi/$2 version=$3
  shift 3
  build_go "$place" "$module" "$version" "$version" "-X main.version=$version" "${@/#/$module/cmd/}"
}

build_snapshotter() {
  build_sidecar "$1" external-snapshotter/v8 "$ZPOD_CSI_SNAPSHOTTER_VERSION" csi-snapshotter snapshot-controller
}

# The definitions of snapshots and of groups of them, beside the programs, which were there before those of groups were.
snapshot_crds() {
  local place=$cache/tools/csi-snapshotter-$ZPOD_CSI_SNAPSHOTTER_VERSION module=github.com/kubernetes-csi/external-snapshotter
  local crds=$place/crds/groupsnapshot.storage.k8s.io_volumegroupsnapshots.yaml
  if [ ! -f "$crds" ]; then
    crds=$(GOFLAGS=-mod=mod GOWORK=off go list -C "$place" -m -f '{{.Dir}}' $module/client/v8)/config/crd
    install -D -m 644 -t "$place/crds" "$crds/"{snapshot,groupsnapshot}.storage.k8s.io_*.yaml
  fi
}

build_helm() {
  local version=$ZPOD_HELM_VERSION module=helm.sh/helm/v4
  build_go "$1" $module "$version" "$version" "-X $module/internal/version.version=$version" $module/cmd/helm
}

build_helm3() {
  local version=$ZPOD_HELM3_VERSION module=helm.sh/helm/v3 minor=${ZPOD_KUBERNETES_VERSION#v1.} stamp package
  stamp="-X $module/internal/version.version=$version"
  # What `helm template` and `helm lint` take the cluster for.
  for package in pkg/lint/rules pkg/chartutil; do
    stamp+=" -X $module/$package.k8sVersionMajor=1 -X $module/$package.k8sVersionMinor=${minor%%.*}"
  done
  build_go "$1" $module "$version" "$version" "$stamp" $module/cmd/helm
  mv "$1/bin/helm" "$1/bin/helm3"
}

build_helm_docs() {
  local version=$ZPOD_HELM_DOCS_VERSION module=github.com/norwoodj/helm-docs
  build_go "$1" $module "$version" "$version" "-X main.version=${version#v}" $module/cmd/helm-docs
}

kubernetes() {
  tool etcd "$ZPOD_ETCD_VERSION" build_etcd
  tool kubernetes "$ZPOD_KUBERNETES_VERSION" build_kubernetes
  local version=$ZPOD_CSI_PROVISIONER_VERSION
  tool csi-provisioner "$version" build_sidecar external-provisioner/v6 "$version" csi-provisioner
  version=$ZPOD_CSI_RESIZER_VERSION
  tool csi-resizer "$version" build_sidecar external-resizer/v2 "$version" csi-resizer
  tool csi-snapshotter "$ZPOD_CSI_SNAPSHOTTER_VERSION" build_snapshotter
  snapshot_crds
  tool helm "$ZPOD_HELM_VERSION" build_helm
  tool helm3 "$ZPOD_HELM3_VERSION" build_helm3
  tool helm-docs "$ZPOD_HELM_DOCS_VERSION" build_helm_docs
}

what=${1:-}
case $what in
  '') ;;
  # A node of the test cluster gives its pods a network with ip(8).
  kubernetes) packages+=(iproute2) ;;
  *) die "usage: deploy/setup.sh [kubernetes]" ;;
esac
check_machine
if [ "$(id -u)" -ne 0 ]; then die 'run this as root: it installs Debian packages'; fi
mkdir -p "$cache/bin"
exec 9>"$cache/.setup.lock"
flock 9
install_packages
tool vhost-device-vsock "$ZPOD_VHOST_DEVICE_VSOCK_VERSION" build_vsock
tool csi-sanity "$ZPOD_CSI_SANITY_VERSION" build_sanity
[ -z "$what" ] || kubernetes
say "ready; tools are in $cache/bin"
