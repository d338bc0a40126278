#!/usr/bin/env bash
# Writes what is generated of the Helm chart, or checks the chart.
#
#   deploy/charts.sh generate   custom resource definitions, the chart's README, plain manifests
#   deploy/charts.sh check      that these are up to date, and the chart by Helm 4 and Helm 3:
#                               schema, every file in tests/accepted, every file in tests/refused
#
# Needs helm, helm3 and helm-docs: `deploy/setup.sh kubernetes` puts them into the cache.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${ZPOD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/zpod}
PATH=$cache/bin:$PATH
chart=$root/charts/zpod
namespace=zpod-system

say() { printf 'charts: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

for tool in helm helm3 helm-docs; do
  command -v "$tool" >/dev/null || die "$tool is missing: run deploy/setup.sh kubernetes"
done

# Helm reads the user's configuration otherwise, and his cluster.
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export HELM_CONFIG_HOME=$scratch/config HELM_CACHE_HOME=$scratch/cache HELM_DATA_HOME=$scratch/data KUBECONFIG=$scratch/none

render() {
  local helm=$1
  shift
  "$helm" template zpod "$chart" --namespace "$namespace" --kube-version 1.37.2 "$@"
}

# Everything that is generated, into $scratch/fresh, laid out as the repository.
generate() {
  local into=$scratch/fresh
  mkdir -p "$into/charts" "$into/deploy/kubernetes"
  # From a copy, since the manifests contain what is generated first.
  cp -a "$chart" "$into/charts"
  chart=$into/charts/zpod
  (cd "$root" && cargo run --quiet --locked -p zpod-kubernetes --bin zpod-crds) >"$chart/files/crds.yaml"
  helm-docs --chart-search-root "$chart" --log-level error
  {
    cat <<EOF
# Generated from charts/zpod with its default values: run make charts.
#   kubectl apply --server-side -f zpod.yaml
apiVersion: v1
kind: Namespace
metadata:
  name: $namespace
  labels:
    # The node plugin mounts directories of the node.
    pod-security.kubernetes.io/enforce: privileged
EOF
    render helm --no-hooks
  } >"$into/deploy/kubernetes/zpod.yaml"
  {
    cat <<EOF
# Generated from charts/zpod with its default values: run make charts.
# After zpod is gone, removes the guest's kernel and initrd from the nodes:
#   kubectl apply --server-side -f guest-uninstall.yaml
#   kubectl --namespace $namespace rollout status daemonset/zpod-guest-uninstall
#   kubectl delete -f guest-uninstall.yaml
EOF
    render helm --show-only templates/guest-uninstall.yaml
  } >"$into/deploy/kubernetes/guest-uninstall.yaml"
}

generated=(charts/zpod/files/crds.yaml charts/zpod/README.md deploy/kubernetes/zpod.yaml deploy/kubernetes/guest-uninstall.yaml)

install_fresh() {
  local file
  for file in "${generated[@]}"; do
    cmp -s "$scratch/fresh/$file" "$root/$file" || install -m 644 "$scratch/fresh/$file" "$root/$file"
  done
}

check_drift() {
  local file
  for file in "${generated[@]}"; do
    diff -u "$root/$file" "$scratch/fresh/$file" || die "$file is out of date: run make charts"
  done
}

# Helm 3 and 4 render alike, but for empty lines between documents.
check_values() {
  local values=$1 helm
  for helm in helm helm3; do
    "$helm" lint --strict --quiet "$chart" --values "$values" >"$scratch/lint" 2>&1 || {
      cat "$scratch/lint"
      die "$helm lint refuses $values"
    }
    render "$helm" --values "$values" --api-versions snapshot.storage.k8s.io/v1 \
      --api-versions groupsnapshot.storage.k8s.io/v1 | grep -v '^ *$' >"$scratch/$helm.yaml"
  done
  diff -u "$scratch/helm3.yaml" "$scratch/helm.yaml" || die "Helm 3 and 4 render $values differently"
}

# The first line of such a file is a comment: what the message has to say.
check_refused() {
  local values=$1 helm want
  want=$(sed -n '1s/^# //p' "$values")
  for helm in helm helm3; do
    if render "$helm" --values "$values" >"$scratch/refused" 2>&1; then die "$helm takes $values"; fi
    grep -qF -- "$want" "$scratch/refused" || {
      cat "$scratch/refused"
      die "$helm refuses $values, but doesn't say: $want"
    }
  done
}

check() {
  local values accepted=0 refused=0
  for values in "$chart"/tests/accepted/*.yaml; do
    check_values "$values"
    accepted=$((accepted + 1))
  done
  for values in "$chart"/tests/refused/*.yaml; do
    check_refused "$values"
    refused=$((refused + 1))
  done
  generate
  check_drift
  say "$accepted sets of values accepted, $refused refused, by Helm 4 and Helm 3; nothing is out of date"
}

case ${1:-} in
  generate) generate && install_fresh ;;
  check) check ;;
  *) die 'usage: deploy/charts.sh generate|check' ;;
esac
