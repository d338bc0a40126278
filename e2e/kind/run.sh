#!/usr/bin/env bash
# zpod on a real cluster with real Kata: see README.md.
#
#   e2e/kind/run.sh up     a kind cluster, Kata, our images, our chart
#   e2e/kind/run.sh test   the scenarios, on the cluster that kubectl talks to
#   e2e/kind/run.sh down   the kind cluster and everything in it
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
manifests=$root/e2e/manifests
cluster=zpod
system=zpod-system
space=zpod-e2e
version=$(sed -n 's/^appVersion: *//p' "$root/charts/zpod/Chart.yaml")
# In no registry: they are loaded into the nodes.
images=("localhost/zpod:$version" "localhost/zpod-guest:$version")
kata_chart=oci://ghcr.io/kata-containers/kata-deploy-charts/kata-deploy
kata_version=${KATA_VERSION:-4.1.0}

say() { printf '\n=== %s\n' "$*"; }
die() { printf '%s\n' "$*" >&2; exit 1; }
k() { kubectl --namespace "$space" "$@"; }

need() {
  local tool
  for tool in "$@"; do
    command -v "$tool" >/dev/null || die "$tool is missing"
  done
}

up() {
  need docker helm kind kubectl make
  [ -w /dev/kvm ] || die '/dev/kvm is missing or not ours: Kata needs hardware virtualization'
  modprobe vhost_vsock vhost_net || die 'the kernel modules vhost_vsock and vhost_net are needed'

  say 'images'
  make -C "$root" image
  docker build -f "$root/deploy/docker/zpod.Dockerfile" -t "${images[0]}" "$root"
  docker build -f "$root/deploy/docker/zpod-guest.Dockerfile" -t "${images[1]}" \
    --build-context guest="$root/target/guest-image" "$root"

  say 'cluster'
  kind create cluster --config "$here/cluster.yaml" --wait 5m
  kind load docker-image --name "$cluster" "${images[@]}"
  local node
  for node in $(kind get nodes --name "$cluster"); do
    # Docker gives a container 64 MiB; a guest's memory is a file there.
    docker exec "$node" mount -o remount,size=8G /dev/shm
  done

  say 'Kata'
  helm upgrade --install kata-deploy "$kata_chart" --version "$kata_version" --namespace kube-system \
    --values "$root/charts/zpod/files/kata-deploy-values.yaml" --wait --timeout 20m
  kubectl wait nodes --selector '!node-role.kubernetes.io/control-plane' --timeout 10m \
    --for 'jsonpath={.metadata.labels.katacontainers\.io/kata-runtime}=true'

  say 'zpod'
  kubectl apply --filename "$root/deploy/kubernetes/namespace.yaml"
  helm upgrade --install zpod "$root/charts/zpod" --namespace "$system" --wait --timeout 10m \
    --set image.repository="${images[0]%:*}" --set guest.image.repository="${images[1]%:*}"
  kubectl get zfsnodes
}

# The checksum that the writer's log ends with.
checksum() {
  k wait pod/writer --for condition=Ready --timeout 5m >&2
  local tries line=''
  for ((tries = 0; tries < 30; tries++)); do
    line=$(k logs writer | grep ' /data/file$' || true)
    [ -z "$line" ] || break
    sleep 2
  done
  [ -n "$line" ] || die 'the writer says no checksum'
  printf '%s\n' "${line%% *}"
}

# An event of an object that says something, within a minute.
event() {
  local object=$1 text=$2 tries
  for ((tries = 0; tries < 30; tries++)); do
    if k get events --field-selector "involvedObject.name=$object" -o 'jsonpath={.items[*].message}' | grep -qi -- "$text"; then
      return
    fi
    sleep 2
  done
  k describe pod "$object"
  die "no event of $object says: $text"
}

scenarios() {
  need kubectl
  kubectl create namespace "$space" --dry-run=client -o yaml | kubectl apply -f -
  kubectl apply -f "$manifests/classes.yaml"

  say 'a claim waits for its pod, is bound, and holds what the pod writes'
  k apply -f "$manifests/claim.yaml"
  [ "$(k get pvc data -o 'jsonpath={.status.phase}')" = Pending ] || die 'the claim did not wait for a pod'
  k apply -f "$manifests/pod.yaml"
  local before after
  before=$(checksum)
  k logs writer | grep -q ' zfs ' || die '/data is not ZFS'

  say 'the next pod finds the same bytes'
  k delete -f "$manifests/pod.yaml" --wait
  k apply -f "$manifests/pod.yaml"
  after=$(checksum)
  [ "$before" = "$after" ] || die "$before has become $after"

  say 'the claim grows while its pod runs'
  k apply -f "$manifests/claim-expanded.yaml"
  k wait pvc/data --for 'jsonpath={.status.capacity.storage}=2Gi' --timeout 3m
  k exec writer -- df -h /data

  say 'the volume outlives its node plugin'
  kubectl --namespace "$system" rollout restart daemonset/zpod-node
  kubectl --namespace "$system" rollout status daemonset/zpod-node --timeout 5m
  k exec -i writer -- sha256sum -c - <<<"$before  /data/file"

  say 'a pod on the wrong runtime is told so'
  k apply -f "$manifests/wrong-runtime.yaml"
  event wrong-runtime runtimeClassName
  k delete -f "$manifests/wrong-runtime.yaml"

  say 'a pod that mounts a part of its volume is told so'
  k apply -f "$manifests/subpath.yaml"
  event subpath subPath
  k delete -f "$manifests/subpath.yaml"

  say 'a pod that is not root owns its volume by its group'
  k apply -f "$manifests/group.yaml"
  k wait pod/group --for condition=Ready --timeout 5m
  k exec group -- stat -c %g /data | grep -qx 2000 || die 'the volume is not of group 2000'
  k delete -f "$manifests/group.yaml"

  say 'a StatefulSet of three'
  k apply -f "$manifests/statefulset.yaml"
  k rollout status statefulset/store --timeout 10m
  k delete -f "$manifests/statefulset.yaml"

  say 'nothing is left'
  k delete -f "$manifests/pod.yaml" -f "$manifests/claim.yaml" --wait
  kubectl wait zfsvolumes --all --for delete --timeout 3m || true
  [ -z "$(kubectl get zfsvolumes -o name)" ] || die 'volumes are left'
  kubectl delete -f "$manifests/classes.yaml"
  kubectl delete namespace "$space" --wait
  say 'all scenarios passed'
}

case ${1:-} in
  up) up ;;
  test) scenarios ;;
  down) need kind && kind delete cluster --name "$cluster" ;;
  *) die 'usage: e2e/kind/run.sh up|test|down' ;;
esac
