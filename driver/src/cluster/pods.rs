use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Container, PersistentVolume, Pod, PodSpec, VolumeMount};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, Client};
use zpod_storage::catalog::{ClaimRef, PodRef, Volume};
use zpod_volume::VolumeId;

use crate::csi::DRIVER;
use crate::guest::clean;
use crate::kata::{KataRuntime, RuntimeHandler};
use crate::volumes::{CLAIM_NAME, CLAIM_NAMESPACE, Observed, PodCheck, VolumeError};

/// For each of the two questions to the API server. Kubelet waits 2 minutes for the call, and repeats it.
const PATIENCE: Duration = Duration::from_secs(10);

/// Lets volumes go only to pods whose guest can have them.
///
/// # Design
/// On any other runtime the pod would find the read-only placeholder where its data should be, and with a subPath
/// kubelet would work in it. Both are refused before anything is done, in words that reach the pod's events. The pod is
/// read from the API server, not from kubelet's request: what counts is what the runtime will be given.
#[derive(Clone)]
pub struct ClusterPods {
    client: Client,
    handlers: Vec<RuntimeHandler>,
}

impl fmt::Debug for ClusterPods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterPods").field("handlers", &self.handlers).finish_non_exhaustive()
    }
}

/// Why a pod does not get a volume now.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Refusal {
    /// Its specification must change.
    Pod(String),
    /// It may in a moment.
    Unknown(String),
}

impl ClusterPods {
    /// Takes pods whose RuntimeClass has one of these handlers.
    pub fn new(client: Client, handlers: Vec<RuntimeHandler>) -> Self {
        Self { client, handlers }
    }

    async fn look(&self, wanted: &PodRef, volume: &Volume, target: &Path) -> Result<Option<ClaimRef>, Refusal> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &wanted.namespace);
        let pod = ask("the pod", pods.get_opt(&wanted.name)).await?;
        let same = |pod: &Pod| pod.metadata.uid.as_deref() == Some(wanted.uid.as_str());
        let spec = pod.filter(same).and_then(|pod| pod.spec).ok_or_else(|| {
            Refusal::Unknown(format!("there is no pod of that name with UID {} any more", wanted.uid))
        })?;
        let class = match named_class(&spec) {
            None => None,
            Some(name) => {
                let classes: Api<RuntimeClass> = Api::all(self.client.clone());
                Some((name, ask("its RuntimeClass", classes.get_opt(name)).await?))
            }
        };
        let handler = class.as_ref().map(|(name, class)| (*name, class.as_ref().map(|class| class.handler.as_str())));
        let runtime = check_runtime(handler, &self.handlers)?;
        let claim = self.claim(wanted, volume, target).await?;
        let volumes = names(&wanted.name, &spec, claim_name(wanted, volume, claim.as_ref()), volume.ephemeral);
        check_mounts(&spec, &volumes)?;
        if runtime == Some(KataRuntime::Rust) {
            check_order(&spec, &volumes, &self.handlers)?;
        }
        Ok(claim)
    }

    /// The claim that the volume's PersistentVolume is bound to. A claim that says so of itself counts for nothing, and
    /// neither does that for which the volume was made: it may be gone, and the volume another tenant's.
    async fn claim(&self, pod: &PodRef, volume: &Volume, target: &Path) -> Result<Option<ClaimRef>, Refusal> {
        if volume.ephemeral {
            return Ok(None);
        }
        let Some(name) = persistent_volume(target) else { return Ok(None) };
        let volumes: Api<PersistentVolume> = Api::all(self.client.clone());
        let found = ask("its PersistentVolume", volumes.get_opt(name)).await?;
        let found = found.ok_or_else(|| Refusal::Unknown(format!("there is no PersistentVolume {name} any more")))?;
        let spec = found.spec.unwrap_or_default();
        let handle = spec.csi.filter(|csi| csi.driver == DRIVER).map(|csi| csi.volume_handle).unwrap_or_default();
        if handle != volume.id.to_string() {
            let handle = clean(&handle, 128);
            return Err(Refusal::Pod(format!("kubelet wants it for PersistentVolume {name}, which is of {handle:?}")));
        }
        let bound = found.status.and_then(|status| status.phase).is_some_and(|phase| phase == "Bound");
        let part = |value: Option<String>| value.unwrap_or_default();
        let claim = spec.claim_ref.map(|claim| ClaimRef {
            namespace: part(claim.namespace),
            name: part(claim.name),
            uid: part(claim.uid),
        });
        let Some(claim) = claim.filter(|claim| bound && !claim.uid.is_empty()) else {
            return Err(Refusal::Unknown(format!("its PersistentVolume {name} is bound to no claim")));
        };
        if claim.namespace != pod.namespace {
            return Err(Refusal::Pod(format!(
                "its PersistentVolume {name} is bound to a claim of namespace {}, and a pod can use those of its own only",
                claim.namespace
            )));
        }
        Ok(Some(claim))
    }
}

/// The PersistentVolume that a target path is for: kubelet puts its name there, for file systems as
/// `pods/UID/volumes/kubernetes.io~csi/NAME/mount`, for block devices as `volumeDevices/publish/NAME/UID`.
fn persistent_volume(target: &Path) -> Option<&str> {
    let mut parts = target.components().rev().map(|part| part.as_os_str().to_str());
    let (last, name, parent, above) = (parts.next()??, parts.next()??, parts.next()??, parts.next()??);
    let files = last == "mount" && parent == "kubernetes.io~csi" && above == "volumes";
    let device = parent == "publish" && above == "volumeDevices";
    (files || device).then_some(name)
}

fn named_class(spec: &PodSpec) -> Option<&str> {
    spec.runtime_class_name.as_deref().filter(|name| !name.is_empty())
}

async fn ask<T>(what: &str, answer: impl Future<Output = kube::Result<T>>) -> Result<T, Refusal> {
    let unknown = |reason: String| Refusal::Unknown(format!("the API server can't be asked for {what}: {reason}"));
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(answer) => answer.map_err(|error| unknown(error.to_string())),
        Err(_) => Err(unknown(format!("no answer in {PATIENCE:?}"))),
    }
}

#[async_trait]
impl PodCheck for ClusterPods {
    async fn check(
        &self,
        pod: Option<&PodRef>,
        volume: &Volume,
        target: &Path,
    ) -> Result<Option<ClaimRef>, VolumeError> {
        let id = volume.id;
        let Some(pod) = pod.filter(|pod| !pod.uid.is_empty() && !pod.namespace.is_empty()) else {
            let reason = "kubelet did not say which pod this is for, so its runtime can't be checked: the CSIDriver object \
                          csi.zpod.storage must have spec.podInfoOnMount: true, as zpod's chart installs it";
            return Err(VolumeError::PodRefused { id, pod: "without a name".into(), reason: reason.into() });
        };
        self.look(pod, volume, target).await.map_err(|refusal| match refusal {
            Refusal::Pod(reason) => VolumeError::PodRefused { id, pod: pod.to_string(), reason },
            Refusal::Unknown(reason) => {
                VolumeError::PodUnknown { id, pod: pod.to_string(), reason: clean(&reason, 512) }
            }
        })
    }

    async fn runs_with(&self, volume: &Observed, pod: &PodRef) -> Result<bool, VolumeError> {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let found = ask("the pod", pods.get_opt(&pod.name)).await;
        let found = found.map_err(|(Refusal::Pod(reason) | Refusal::Unknown(reason))| VolumeError::PodUnknown {
            id: volume.id,
            pod: pod.to_string(),
            reason: clean(&reason, 512),
        })?;
        // Of a pod that is on its way out, kubelet says at the end only which containers have ended.
        let same = |found: &Pod| {
            found.metadata.uid.as_deref() == Some(pod.uid.as_str()) && found.metadata.deletion_timestamp.is_none()
        };
        let Some(Pod { spec: Some(spec), status: Some(status), .. }) = found.filter(same) else { return Ok(false) };
        let claim = volume.labels.get(CLAIM_NAME).map(String::as_str);
        let volumes = match claim {
            Some(_) => names(&pod.name, &spec, claim, false),
            // An inline volume: kubelet names its directory as the pod does.
            None => persistent_volume(&volume.target).into_iter().collect(),
        };
        let mounts = |container: &Container| {
            let files = container.volume_mounts.iter().flatten().map(|mount| mount.name.as_str());
            let devices = container.volume_devices.iter().flatten().map(|device| device.name.as_str());
            files.chain(devices).any(|name| volumes.contains(name))
        };
        let statuses = [&status.container_statuses, &status.init_container_statuses];
        let running: BTreeSet<&str> = statuses
            .into_iter()
            .flat_map(|statuses| statuses.iter().flatten())
            .filter(|status| status.state.as_ref().is_some_and(|state| state.running.is_some()))
            .map(|status| status.name.as_str())
            .collect();
        Ok(starts(&spec).any(|(container, _)| running.contains(container.name.as_str()) && mounts(container)))
    }

    async fn is_gone(&self, id: VolumeId, pod: &PodRef) -> Result<bool, VolumeError> {
        if pod.uid.is_empty() || pod.namespace.is_empty() {
            return Ok(false);
        }
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &pod.namespace);
        let found = ask("the pod", pods.get_metadata_opt(&pod.name)).await;
        let found = found.map_err(|(Refusal::Pod(reason) | Refusal::Unknown(reason))| VolumeError::PodUnknown {
            id,
            pod: pod.to_string(),
            reason: clean(&reason, 512),
        })?;
        Ok(found.and_then(|found| found.metadata.uid).is_none_or(|uid| uid != pod.uid))
    }
}

/// The pod's RuntimeClass by name, with its handler where it exists.
type Class<'a> = Option<(&'a str, Option<&'a str>)>;

/// The runtime behind the pod's handler, where it is known.
fn check_runtime(class: Class<'_>, handlers: &[RuntimeHandler]) -> Result<Option<KataRuntime>, Refusal> {
    let ours = handlers.first().map_or("kata-zpod", |handler| handler.name.as_str());
    let why = format!(
        "a zpod volume is a ZFS pool that lives in the kernel of the pod's own Kata guest, and only a guest with zpod-guest \
         can open it; write spec.runtimeClassName: {ours} in the pod (spec.template.spec.runtimeClassName: {ours} in a \
         Deployment, StatefulSet or Job)"
    );
    match class {
        Some((name, Some(handler))) => match handlers.iter().find(|allowed| allowed.name == handler) {
            Some(allowed) => Ok(allowed.runtime),
            None => Err(Refusal::Pod(format!(
                "its RuntimeClass {name} has handler {handler}, which has no zpod-guest; {why}"
            ))),
        },
        None => Err(Refusal::Pod(format!("it has no runtimeClassName and would run on the node's own kernel; {why}"))),
        Some((name, None)) => Err(Refusal::Pod(format!("its RuntimeClass {name} does not exist; {why}"))),
    }
}

/// The name of the volume's claim, as its pod has it. Where kubelet's path names no PersistentVolume, that is the claim the
/// volume was made for, if that can be the pod's.
fn claim_name<'a>(pod: &PodRef, volume: &'a Volume, claim: Option<&'a ClaimRef>) -> Option<&'a str> {
    let label = |key: &str| volume.labels.get(key).map(String::as_str);
    let made_for = || label(CLAIM_NAMESPACE).filter(|namespace| *namespace == pod.namespace).and(label(CLAIM_NAME));
    claim.map(|claim| claim.name.as_str()).or_else(made_for)
}

/// What the pod calls a volume. Which of its inline volumes it is its handle does not tell: all of them are.
fn names<'a>(pod: &str, spec: &'a PodSpec, claim: Option<&str>, inline: bool) -> BTreeSet<&'a str> {
    let claim = claim.unwrap_or_default();
    let volumes = spec.volumes.iter().flatten().filter_map(|volume| {
        let named = volume.persistent_volume_claim.as_ref();
        let named = named.is_some_and(|source| !claim.is_empty() && source.claim_name == claim);
        // The claim of a generic ephemeral volume is named after pod and volume.
        let made = volume.ephemeral.is_some() && claim == format!("{pod}-{}", volume.name);
        let inline = inline && volume.csi.as_ref().is_some_and(|source| source.driver == DRIVER);
        (named || made || inline).then_some(volume.name.as_str())
    });
    volumes.collect()
}

/// The pod's containers that go on while others start, and those others, in the order in which they start.
fn starts(spec: &PodSpec) -> impl Iterator<Item = (&Container, bool)> {
    let init = spec.init_containers.iter().flatten();
    let init = init.map(|container| (container, container.restart_policy.as_deref() == Some("Always")));
    init.chain(spec.containers.iter().map(|container| (container, true)))
}

/// Refuses what runtime-rs does not do: it plugs a disk in as the first container mounts it, and all that come while that
/// one runs get it so.
fn check_order(spec: &PodSpec, volumes: &BTreeSet<&str>, handlers: &[RuntimeHandler]) -> Result<(), Refusal> {
    for volume in volumes {
        let mut reader: Option<&str> = None;
        for (container, stays) in starts(spec) {
            let mut mounts = container.volume_mounts.iter().flatten().filter(|mount| mount.name == **volume).peekable();
            let Some(first) = mounts.peek() else { continue };
            let reads = first.read_only.unwrap_or(false);
            let writer = mounts.find(|mount| !mount.read_only.unwrap_or(false));
            let before = reader.or_else(|| reads.then_some(container.name.as_str()));
            if let (Some(reader), Some(writer)) = (before, writer) {
                let go = handlers.iter().find(|handler| handler.runtime == Some(KataRuntime::Go));
                let go = go.map_or("kata-zpod", |handler| handler.name.as_str());
                return Err(Refusal::Pod(format!(
                    "container {reader} mounts its volume {volume} with readOnly: true, and container {} mounts it writable \
                     at {} after that; Kata's runtime-rs plugs the disk in read-only for both; write \
                     spec.runtimeClassName: {go}, whose runtime does not, or let the first of them mount it writable",
                    container.name, writer.mount_path,
                )));
            }
            if stays {
                if !reads {
                    break;
                }
                reader = reader.or(Some(container.name.as_str()));
            }
        }
    }
    Ok(())
}

/// Refuses subPath: kubelet resolves it on the node, where there is only the placeholder.
fn check_mounts(spec: &PodSpec, volumes: &BTreeSet<&str>) -> Result<(), Refusal> {
    let check = |kind: &str, container: &str, mounts: Option<&Vec<VolumeMount>>| {
        for mount in mounts.into_iter().flatten().filter(|mount| volumes.contains(mount.name.as_str())) {
            let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
            let paths = [("subPath", given(&mount.sub_path)), ("subPathExpr", given(&mount.sub_path_expr))];
            if let Some((field, path)) = paths.into_iter().find_map(|(field, path)| Some((field, path?))) {
                return Err(Refusal::Pod(format!(
                    "{kind} {container} mounts it at {} with {field}: {path}, which kubelet would look for on the node, \
                     while the files are inside the guest; leave {field} out, mount the whole volume and let the program \
                     use {}/{path}, or give it a volume of its own",
                    mount.mount_path,
                    mount.mount_path.trim_end_matches('/'),
                )));
            }
        }
        Ok(())
    };
    let mut containers = spec.containers.iter();
    containers.try_for_each(|c| check("container", &c.name, c.volume_mounts.as_ref()))?;
    let mut init = spec.init_containers.iter().flatten();
    init.try_for_each(|c| check("init container", &c.name, c.volume_mounts.as_ref()))?;
    let mut ephemeral = spec.ephemeral_containers.iter().flatten();
    ephemeral.try_for_each(|c| check("ephemeral container", &c.name, c.volume_mounts.as_ref()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fake::{Answers, volume};
    use serde_json::{Value, json};

    fn handlers(all: &[&str]) -> Vec<RuntimeHandler> {
        all.iter().map(|handler| handler.parse().unwrap()).collect()
    }

    fn pod() -> PodRef {
        PodRef { namespace: "prod".into(), name: "db-0".into(), uid: "u-1".into() }
    }

    fn object(spec: Value) -> Value {
        json!({"metadata": {"name": "db-0", "namespace": "prod", "uid": "u-1"}, "spec": spec})
    }

    fn spec(class: Option<&str>, mount: Value) -> Value {
        json!({
            "runtimeClassName": class,
            "volumes": [
                {"name": "data", "persistentVolumeClaim": {"claimName": "data-db-0"}},
                {"name": "other", "persistentVolumeClaim": {"claimName": "other"}},
                {"name": "tmp", "ephemeral": {}},
            ],
            "containers": [{"name": "db", "volumeMounts": [mount]}],
        })
    }

    fn whole() -> Value {
        json!({"name": "data", "mountPath": "/data"})
    }

    async fn check(answers: Answers, pod: Option<&PodRef>) -> Result<(), VolumeError> {
        let pods = ClusterPods::new(answers.client(), handlers(&["kata-zpod=go", "kata-zpod-clh=rust"]));
        pods.check(pod, &volume("data-db-0"), Path::new("/t")).await.map(drop)
    }

    fn world(spec: Value) -> Answers {
        Answers::default()
            .with("/api/v1/namespaces/prod/pods/db-0", object(spec))
            .with("/apis/node.k8s.io/v1/runtimeclasses/ours", json!({"metadata": {}, "handler": "kata-zpod-clh"}))
            .with("/apis/node.k8s.io/v1/runtimeclasses/gvisor", json!({"metadata": {}, "handler": "runsc"}))
    }

    async fn refused(answers: Answers) -> String {
        match check(answers, Some(&pod())).await {
            Err(error @ VolumeError::PodRefused { .. }) => error.to_string(),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_pod_with_one_of_our_runtimes_gets_the_volume() {
        check(world(spec(Some("ours"), whole())), Some(&pod())).await.unwrap();
        // A subPath of another volume is none of our business.
        let other = json!({"name": "other", "mountPath": "/x", "subPath": "a"});
        check(world(spec(Some("ours"), other)), Some(&pod())).await.unwrap();
    }

    #[tokio::test]
    async fn any_other_runtime_is_refused_with_what_to_write_in_the_pod() {
        for (class, why) in [
            (None, "no runtimeClassName"),
            (Some("gvisor"), "RuntimeClass gvisor has handler runsc"),
            (Some("gone"), "RuntimeClass gone does not exist"),
        ] {
            let error = refused(world(spec(class, whole()))).await;
            for part in [why, "spec.runtimeClassName: kata-zpod ", "pod prod/db-0", "spec.template.spec"] {
                assert!(error.contains(part), "{part:?} in {error}");
            }
        }
    }

    #[tokio::test]
    async fn a_sub_path_is_refused_in_every_kind_of_container_with_what_to_do_instead() {
        let sub = json!({"name": "data", "mountPath": "/data/", "subPath": "a"});
        let expr = json!({"name": "data", "mountPath": "/data", "subPathExpr": "$(POD)"});
        let error = refused(world(spec(Some("ours"), sub.clone()))).await;
        assert!(error.contains("container db mounts it at /data/ with subPath: a"), "{error}");
        assert!(error.contains("use /data/a"), "{error}");
        let error = refused(world(spec(Some("ours"), expr))).await;
        assert!(error.contains("with subPathExpr: $(POD)"), "{error}");
        for (key, kind) in [("initContainers", "init container i"), ("ephemeralContainers", "ephemeral container i")] {
            let mut spec = spec(Some("ours"), whole());
            spec[key] = json!([{"name": "i", "volumeMounts": [sub]}]);
            let error = refused(world(spec)).await;
            assert!(error.contains(kind), "{error}");
        }
    }

    /// A pod whose containers mount its volume so, in their order: name, kind and whether read-only.
    fn order(class: &str, all: &[(&str, &str, bool)]) -> Value {
        let mut spec = spec(Some(class), whole());
        let of = |wanted: &[&str]| -> Vec<Value> {
            let here = all.iter().filter(|(_, kind, _)| wanted.contains(kind));
            here.map(|(name, kind, read_only)| {
                let mounts = json!([{"name": "data", "mountPath": "/data", "readOnly": read_only}]);
                let policy = if *kind == "sidecar" { json!("Always") } else { Value::Null };
                json!({"name": name, "volumeMounts": mounts, "restartPolicy": policy})
            })
            .collect()
        };
        spec["initContainers"] = of(&["init", "sidecar"]).into();
        spec["containers"] = of(&["main"]).into();
        spec
    }

    #[tokio::test]
    async fn a_writer_after_a_reader_is_refused_on_runtime_rs_alone_with_the_class_that_can() {
        type Containers = &'static [(&'static str, &'static str, bool)];
        let cases: [(Containers, bool); 7] = [
            (&[("reader", "main", true), ("writer", "main", false)], true),
            (&[("reader", "sidecar", true), ("writer", "init", false), ("app", "main", true)], true),
            (&[("reader", "sidecar", true), ("writer", "main", false)], true),
            (&[("writer", "main", false), ("reader", "main", true)], false),
            // It has ended when the next one starts.
            (&[("reader", "init", true), ("writer", "main", false)], false),
            (&[("one", "main", true), ("two", "main", true)], false),
            (&[("one", "main", false), ("two", "main", false)], false),
        ];
        for (containers, refused) in cases {
            // `ours` has the handler kata-zpod-clh, which is runtime-rs here.
            match check(world(order("ours", containers)), Some(&pod())).await {
                Ok(()) => assert!(!refused, "{containers:?}"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(
                        refused && text.contains("container reader") && text.contains("container writer"),
                        "{text}"
                    );
                    assert!(text.contains("spec.runtimeClassName: kata-zpod,"), "{text}");
                }
            }
            let go = ClusterPods::new(world(order("ours", containers)).client(), handlers(&["kata-zpod-clh=go"]));
            go.check(Some(&pod()), &volume("data-db-0"), Path::new("/t")).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_container_runs_with_a_volume_when_it_mounts_it_and_is_running() {
        let running = |name: &str| json!({"name": name, "state": {"running": {}}});
        let waiting = |name: &str| json!({"name": name, "state": {"waiting": {"reason": "ContainerCreating"}}});
        let Volume { id, labels, capacity, .. } = volume("data-db-0");
        let observed = Observed { id, target: "/t".into(), pod: Some(pod()), labels, capacity };
        let runs = async |observed: &Observed, object: Value, uid: &str| {
            let answers = Answers::default().with("/api/v1/namespaces/prod/pods/db-0", object);
            let pod = PodRef { uid: uid.into(), ..pod() };
            ClusterPods::new(answers.client(), vec![]).runs_with(observed, &pod).await.unwrap()
        };
        for (statuses, uid, want) in [
            (json!([running("db")]), "u-1", true),
            (json!([waiting("db")]), "u-1", false),
            (json!([running("other"), waiting("db")]), "u-1", false),
            (json!([running("db")]), "u-2", false),
            (json!([]), "u-1", false),
        ] {
            let mut spec = spec(Some("ours"), whole());
            spec["containers"].as_array_mut().unwrap().push(json!({"name": "other"}));
            let mut object = object(spec);
            object["status"] = json!({"containerStatuses": statuses});
            assert_eq!(runs(&observed, object.clone(), uid).await, want, "{statuses} {uid}");
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            assert!(!runs(&observed, object, uid).await, "it is on its way out: {statuses}");
        }
        // Of two inline volumes, each is its own.
        let inline = |name: &str| json!({"name": name, "csi": {"driver": DRIVER}});
        let mounts = |container: &str, name: &str| json!({"name": container, "volumeMounts": [{"name": name, "mountPath": "/data"}]});
        let mut object = object(json!({
            "volumes": [inline("a"), inline("b")], "initContainers": [mounts("first", "a")], "containers": [mounts("db", "b")],
        }));
        object["status"] = json!({"initContainerStatuses": [running("first")], "containerStatuses": [waiting("db")]});
        for (name, want) in [("a", true), ("b", false)] {
            let target = format!("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/{name}/mount").into();
            let observed = Observed { target, labels: Default::default(), ..observed.clone() };
            assert_eq!(runs(&observed, object.clone(), "u-1").await, want, "{name}");
        }
    }

    #[tokio::test]
    async fn the_claim_of_a_generic_ephemeral_volume_is_known_by_its_name() {
        let sub = json!({"name": "tmp", "mountPath": "/tmp", "subPath": "a"});
        let pods = ClusterPods::new(world(spec(Some("ours"), sub)).client(), handlers(&["kata-zpod-clh"]));
        let error = pods.check(Some(&pod()), &volume("db-0-tmp"), Path::new("/t")).await.unwrap_err();
        assert!(matches!(error, VolumeError::PodRefused { .. }), "{error}");
    }

    const TARGET: &str = "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/pv-1/mount";

    /// The volume of claim `data-db-0`, which was kept and bound to another claim since, in a pod that mounts this.
    async fn bound(claim: Value, phase: &str, mounted: &str) -> Result<Option<ClaimRef>, String> {
        let volume = volume("data-db-0");
        let spec = json!({
            "runtimeClassName": "ours",
            "volumes": [
                {"name": "old", "persistentVolumeClaim": {"claimName": "data-db-0"}},
                {"name": "kept", "persistentVolumeClaim": {"claimName": "kept"}},
            ],
            "containers": [{"name": "db", "volumeMounts": [{"name": mounted, "mountPath": "/data", "subPath": "a"}]}],
        });
        let pv = json!({
            "metadata": {"name": "pv-1"}, "status": {"phase": phase},
            "spec": {"csi": {"driver": DRIVER, "volumeHandle": volume.id.to_string()}, "claimRef": claim},
        });
        let pods = ClusterPods::new(
            world(spec).with("/api/v1/persistentvolumes/pv-1", pv).client(),
            handlers(&["kata-zpod-clh"]),
        );
        pods.check(Some(&pod()), &volume, Path::new(TARGET)).await.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn only_the_claim_that_the_persistent_volume_is_bound_to_counts() {
        let claim = |namespace: &str| json!({"namespace": namespace, "name": "kept", "uid": "c-2"});
        let want = ClaimRef { namespace: "prod".into(), name: "kept".into(), uid: "c-2".into() };
        // The claim that it was made for is another volume's now.
        assert_eq!(bound(claim("prod"), "Bound", "old").await, Ok(Some(want)));
        let error = bound(claim("prod"), "Bound", "kept").await.unwrap_err();
        assert!(error.contains("container db mounts it at /data with subPath: a"), "{error}");
        let error = bound(claim("other"), "Bound", "old").await.unwrap_err();
        assert!(error.contains("bound to a claim of namespace other"), "{error}");
        for (claim, phase) in [(claim("prod"), "Released"), (Value::Null, "Available")] {
            let error = bound(claim, phase, "old").await.unwrap_err();
            assert!(error.contains("is bound to no claim"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_persistent_volume_of_another_volume_is_refused() {
        let pv = json!({
            "metadata": {"name": "pv-1"}, "status": {"phase": "Bound"},
            "spec": {"csi": {"driver": DRIVER, "volumeHandle": "another"},
                     "claimRef": {"namespace": "prod", "name": "data-db-0", "uid": "c"}},
        });
        let world = world(spec(Some("ours"), whole())).with("/api/v1/persistentvolumes/pv-1", pv);
        let pods = ClusterPods::new(world.client(), handlers(&["kata-zpod-clh"]));
        let error = pods.check(Some(&pod()), &volume("data-db-0"), Path::new(TARGET)).await.unwrap_err();
        assert!(matches!(error, VolumeError::PodRefused { .. }), "{error}");
    }

    #[test]
    fn the_persistent_volume_is_in_kubelets_paths() {
        for (path, name) in [
            (TARGET, Some("pv-1")),
            ("/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv-1/u-1", Some("pv-1")),
            ("/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~nfs/pv-1/mount", None),
            ("/mnt", None),
        ] {
            assert_eq!(persistent_volume(Path::new(path)), name, "{path}");
        }
    }

    #[tokio::test]
    async fn an_inline_volume_is_known_by_its_driver() {
        let sub = json!({"name": "scratch", "mountPath": "/tmp", "subPath": "a"});
        let inline = Volume { ephemeral: true, labels: Default::default(), ..volume("none") };
        for (driver, refused) in [(DRIVER, true), ("csi.example.com", false)] {
            let mut spec = spec(Some("ours"), sub.clone());
            spec["volumes"] = json!([{"name": "scratch", "csi": {"driver": driver}}]);
            let pods = ClusterPods::new(world(spec).client(), handlers(&["kata-zpod-clh"]));
            let answer = pods.check(Some(&pod()), &inline, Path::new("/t")).await;
            assert_eq!(matches!(answer, Err(VolumeError::PodRefused { .. })), refused, "{answer:?}");
        }
    }

    #[tokio::test]
    async fn only_a_pod_that_the_api_server_does_not_know_is_gone() {
        let id = volume("x").id;
        let is_gone =
            async |answers: Answers, pod: PodRef| ClusterPods::new(answers.client(), vec![]).is_gone(id, &pod).await;
        let there = || world(spec(Some("ours"), whole()));
        assert!(!is_gone(there(), pod()).await.unwrap());
        assert!(is_gone(there(), PodRef { uid: "u-2".into(), ..pod() }).await.unwrap());
        assert!(is_gone(Answers::default(), pod()).await.unwrap());
        let nameless = PodRef { uid: String::new(), ..pod() };
        assert!(!is_gone(Answers::default(), nameless).await.unwrap(), "nobody knows which it was");
        is_gone(there().failing(), pod()).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_pod_that_is_gone_or_can_not_be_asked_for_is_no_refusal() {
        let later = PodRef { uid: "u-2".into(), ..pod() };
        for (answers, pod, why) in [
            (Answers::default(), pod(), "no pod of that name with UID u-1"),
            (world(spec(Some("ours"), whole())), later, "no pod of that name with UID u-2"),
            (world(spec(Some("ours"), whole())).failing(), pod(), "can't be asked for the pod"),
        ] {
            let error = check(answers, Some(&pod)).await.unwrap_err();
            assert!(matches!(error, VolumeError::PodUnknown { .. }), "{error}");
            assert!(error.to_string().contains(why), "{error}");
        }
    }

    #[tokio::test]
    async fn without_pod_info_the_reason_names_the_field_of_the_csi_driver_object() {
        let nameless = PodRef { uid: String::new(), ..pod() };
        for pod in [None, Some(&nameless)] {
            let error = check(Answers::default(), pod).await.unwrap_err().to_string();
            assert!(error.contains("podInfoOnMount: true"), "{error}");
        }
    }
}
