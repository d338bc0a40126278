#!/usr/bin/env bash
# Writes what is generated of the Helm chart, or checks the chart.
#
#   deploy/charts.sh generate   custom resource definitions, the chart's README, plain manifests
#   deploy/charts.sh check      that these are up to date; the chart by Helm 4 and Helm 3: schema, every file in
#                               tests/accepted, every line of tests/accepted-by-set, every file in tests/refused;
#                               that nothing it renders destroys anything, that images are pinned, that the
#                               commands in the documents and in NOTES.txt can be pasted
#
# Needs helm, helm3 and helm-docs: `deploy/setup.sh kubernetes` puts them into the cache.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${ZPOD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/zpod}
PATH=$cache/bin:$PATH
chart=$root/charts/zpod
namespace=zpod-system
# Ours have no default.
images=$chart/tests/images.yaml

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
# Generated: run make charts. The namespace of zpod. Deleting it takes the node plugins away under running pods: see
# "Uninstall" in docs/install.md.
apiVersion: v1
kind: Namespace
metadata:
  name: $namespace
  labels:
    # The node plugin mounts directories of the node.
    pod-security.kubernetes.io/enforce: privileged
EOF
  } >"$into/deploy/kubernetes/namespace.yaml"
  {
    cat <<EOF
# Generated: run make charts. The definitions of zpod's records.
#   kubectl apply --server-side -f crds.yaml
# NEVER delete them while there are volumes: all their records would be marked deleted at once.
EOF
    sed 1d "$chart/files/crds.yaml"
  } >"$into/deploy/kubernetes/crds.yaml"
  {
    plain_header zpod.yaml
    cat <<EOF
# The driver, after namespace.yaml and crds.yaml. Deleting what is in here deletes no volume and no record.
EOF
    render_plain --set crds.install=false
  } >"$into/deploy/kubernetes/zpod.yaml"
  {
    plain_header guest-uninstall.yaml
    cat <<EOF
# REMOVES the guest's kernel and initrd from the nodes: DaemonSet zpod-node with an uninstaller in the place of the
# installer. The step before deleting zpod.yaml:
#   kubectl --namespace $namespace rollout status daemonset/zpod-node
# Applying zpod.yaml again puts them back.
EOF
    render_plain --set guest.uninstall=true --show-only templates/node.yaml
  } >"$into/deploy/kubernetes/guest-uninstall.yaml"
}

plain_header() {
  cat <<EOF
# Generated from charts/zpod with its default values: run make charts. REGISTRY is yours: docs/install.md says how to
# build the two images.
#   sed 's#REGISTRY/#registry.example/team/#' $1 | kubectl apply --server-side -f -
EOF
}

# Nobody can pull from REGISTRY, which is no name of a repository: whoever forgets to replace it is told by the pods' events.
render_plain() {
  render helm --set image.repository=registry.invalid/zpod --set guest.image.repository=registry.invalid/zpod-guest "$@" |
    sed 's#registry\.invalid/#REGISTRY/#'
}

generated=(
  charts/zpod/files/crds.yaml charts/zpod/README.md
  deploy/kubernetes/{namespace,crds,zpod,guest-uninstall}.yaml
)

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
    "$helm" lint --strict --quiet "$chart" --values "$images" --values "$values" >"$scratch/lint" 2>&1 || {
      cat "$scratch/lint"
      die "$helm lint refuses $values"
    }
    render "$helm" --values "$images" --values "$values" --api-versions snapshot.storage.k8s.io/v1 \
      --api-versions groupsnapshot.storage.k8s.io/v1 | grep -v '^ *$' >"$scratch/$helm.yaml"
  done
  diff -u "$scratch/helm3.yaml" "$scratch/helm.yaml" || die "Helm 3 and 4 render $values differently"
  check_harmless "$values" "$scratch/helm.yaml"
}

# Whatever renders a chart (helm template, kustomize, Argo CD, Flux) and applies the output applies all of it: hooks too,
# as ordinary objects.
check_harmless() {
  local values=$1 rendered=$2
  ! grep -n 'helm\.sh/hook' "$rendered" || die "$values renders a hook, which is an ordinary object to others than Helm"
  grep -q 'uninstall: true' "$values" || ! grep -nE '^ *- (--)?uninstall' "$rendered" ||
    die "$values renders something that uninstalls"
}

# By --set, where 1.5 is a string. A line has one value or several.
check_set() {
  local line=$1 helm
  for helm in helm helm3; do
    render "$helm" --values "$images" --set "$line" >"$scratch/set" 2>&1 || {
      cat "$scratch/set"
      die "$helm refuses --set $line"
    }
  done
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

# Every image is ours, which has no default, or pinned; and so are the bases of ours.
check_pinned() {
  render helm --values "$images" >"$scratch/pinned"
  ! grep -E '^ *image: ' "$scratch/pinned" | grep -vE 'image: (registry\.example/|.*@sha256:[0-9a-f]{64}$)' ||
    die 'these images have no digest: add them to charts/zpod/files/digests.yaml'
  ! grep -nE '^FROM |^# *syntax=' "$root"/deploy/docker/*.Dockerfile | grep -vE 'FROM (scratch|[^ ]+@sha256:[0-9a-f]{64} )' ||
    die 'these images that ours are built from have no digest'
}

# What a document tells to type is taken by the chart, and makes the namespace first.
check_documented() {
  local document command helm found=0
  for document in README.md docs/install.md charts/zpod/README.md; do
    while IFS= read -r command; do
      found=$((found + 1))
      grep -qE 'namespace\.yaml|pod-security\.kubernetes\.io/enforce=privileged' "$root/$document" ||
        die "$document installs the chart and makes no namespace that may have privileged pods"
      for helm in helm helm3; do
        read -ra words <<<"${command//REGISTRY/registry.example}"
        # helm upgrade --install NAME CHART ..., as helm template does.
        (cd "$root" && "$helm" template --kube-version 1.37.2 "${words[@]:3}") >"$scratch/documented" 2>&1 || {
          cat "$scratch/documented"
          die "$document: $helm refuses: $command"
        }
      done
    done < <(sed -e ':join' -e '/\\$/{N;s/ *\\\n */ /;b join' -e '}' "$root/$document" | grep -E '^helm upgrade --install zpod ')
  done
  [ "$found" -ge 3 ] || die "only $found commands that install the chart are documented"
}

# NOTES.txt as a person pastes it: every here-document ends, and kubectl gets what can be parsed.
check_notes() {
  local stubs=$scratch/stubs tool
  mkdir -p "$stubs"
  for tool in kubectl helm; do
    printf '#!/bin/sh\necho "%s $*" >>"%s/called"\ncase "$*" in *"-f -"*) cat >"%s/applied" ;; esac\n' \
      "$tool" "$stubs" "$stubs" >"$stubs/$tool"
    chmod +x "$stubs/$tool"
  done
  helm install zpod "$chart" --namespace "$namespace" --dry-run=client --values "$images" |
    sed '1,/^NOTES:$/d' >"$stubs/notes"
  # Commands begin in the first column, and so do sentences: what is not a command is left out.
  awk '/<<.EOF.$/ {inside = 1} inside || /^(kubectl|helm|  --)/ {print} /^EOF$/ {inside = 0}' "$stubs/notes" >"$stubs/pasted"
  (cd "$stubs" && PATH=$stubs:$PATH bash -eu pasted 2>"$stubs/complaint") || die "NOTES.txt can't be pasted: $(cat "$stubs/complaint")"
  # bash only warns of a here-document without an end.
  [ ! -s "$stubs/complaint" ] || die "NOTES.txt can't be pasted: $(cat "$stubs/complaint")"
  grep -q '^kind: Pod$' "$stubs/applied" || die 'NOTES.txt applies no pod'
  diff <(sed 's/[[:space:]]*$//' "$chart/files/kata-deploy-values.yaml") "$stubs/kata-deploy-values.yaml" ||
    die "NOTES.txt writes other values for Kata's chart"
  grep -q '^helm upgrade --install kata-deploy ' "$stubs/called" || die 'NOTES.txt does not install Kata'
}

check() {
  local values line accepted=0 refused=0
  for values in "$chart"/tests/accepted/*.yaml; do
    check_values "$values"
    accepted=$((accepted + 1))
  done
  while IFS= read -r line; do
    check_set "$line"
    accepted=$((accepted + 1))
  done < <(grep -v '^#' "$chart/tests/accepted-by-set")
  for values in "$chart"/tests/refused/*.yaml; do
    check_refused "$values"
    refused=$((refused + 1))
  done
  check_pinned
  check_documented
  check_notes
  generate
  check_drift
  say "$accepted sets of values accepted, $refused refused, by Helm 4 and Helm 3; nothing is out of date"
}

case ${1:-} in
  generate) generate && install_fresh ;;
  check) check ;;
  *) die 'usage: deploy/charts.sh generate|check' ;;
esac
