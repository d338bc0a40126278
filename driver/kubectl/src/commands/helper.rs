use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{DeleteParams, PostParams};
use serde_json::{Value, json};
use tokio::time::Instant;
use zpod_admin::HELPER_PREFIX;
use zpod_kubernetes::crd::ZfsVolume;

use crate::cluster::Cluster;
use crate::options::HelperOptions;
use crate::{Failure, progress};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A pod that nobody removed ends by itself.
const LONGEST: u32 = 7 * 24 * 3600;

/// A pod that does nothing but have a volume.
pub(super) struct Helper<'a> {
    cluster: Cluster,
    claim: String,
    name: String,
    options: &'a HelperOptions,
}

impl<'a> Helper<'a> {
    /// Of that claim. Nothing is made yet.
    pub(super) fn new(cluster: &Cluster, namespace: String, claim: String, options: &'a HelperOptions) -> Self {
        let now = Timestamp::now();
        let name = format!("{HELPER_PREFIX}{:x}-{:x}", now.as_millisecond(), std::process::id());
        Self { cluster: Cluster { namespace, ..cluster.clone() }, claim, name, options }
    }

    /// Whether a pod is one of these.
    pub(super) fn is_one(pod: &str) -> bool {
        zpod_admin::is_helper(pod)
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.cluster.client.clone(), &self.cluster.namespace)
    }

    /// Makes it, and gives the volume once the pod runs.
    pub(super) async fn start(&self) -> Result<ZfsVolume, Failure> {
        let claim = self.cluster.claim(&self.claim).await?;
        let block = claim.spec.as_ref().and_then(|spec| spec.volume_mode.as_deref()) == Some("Block");
        let pod: Pod = serde_json::from_value(pod(&self.name, &self.claim, self.options, block))
            .map_err(|error| Failure::failed(format!("no pod: {error}"), ""))?;
        let bar = progress::waiting(format!("starting pod {} for {}", self.name, self.claim));
        let made = self.pods().create(&PostParams::default(), &pod).await;
        made.map_err(|error| Failure::api("a pod for the transfer can't be made", &error))?;
        let begun = Instant::now();
        loop {
            let pod = self.pods().get(&self.name).await.map_err(|error| Failure::api("the transfer's pod", &error))?;
            match pod.status.as_ref().and_then(|status| status.phase.as_deref()) {
                Some("Running") => break,
                Some("Failed" | "Succeeded") => {
                    let what = format!("pod {} has ended: {}", self.name, reason(&pod));
                    return Err(Failure::failed(what, "--helper-image needs a program that stays"));
                }
                _ if begun.elapsed() >= self.options.helper_timeout => {
                    let what = format!("pod {} does not run: {}", self.name, reason(&pod));
                    let remedy = "`kubectl get events` has more; --runtime-class and --helper-image choose how it runs";
                    return Err(Failure::timed_out(what, remedy));
                }
                _ => tokio::time::sleep(LOOK_EVERY).await,
            }
        }
        bar.finish_and_clear();
        let claim = self.cluster.claim(&self.claim).await?;
        self.cluster.volume_of(&claim).await
    }

    /// Removes it. One that is not there is as good.
    pub(super) async fn remove(&self) {
        match self.pods().delete(&self.name, &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => {
                let namespace = &self.cluster.namespace;
                eprintln!("warning: remove pod {} yourself (kubectl -n {namespace} delete pod): {error}", self.name);
            }
        }
    }
}

/// As little as a pod can be: nothing of it is used but its volume. It passes the strictest pod security standard.
fn pod(name: &str, claim: &str, options: &HelperOptions, block: bool) -> Value {
    let mut container = json!({
        "name": "hold", "image": options.helper_image,
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}},
        "securityContext": {"allowPrivilegeEscalation": false, "readOnlyRootFilesystem": true, "runAsNonRoot": true,
                            "runAsUser": 65535, "capabilities": {"drop": ["ALL"]},
                            "seccompProfile": {"type": "RuntimeDefault"}},
    });
    match block {
        true => container["volumeDevices"] = json!([{"name": "data", "devicePath": "/dev/zpod"}]),
        false => container["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]),
    }
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "kubectl-zpod"}},
        "spec": {
            "runtimeClassName": options.runtime_class, "restartPolicy": "Never", "activeDeadlineSeconds": LONGEST,
            "automountServiceAccountToken": false, "enableServiceLinks": false, "terminationGracePeriodSeconds": 5,
            "containers": [container],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": claim}}],
        },
    })
}

/// What the pod waits for, in the words of whoever it waits for.
fn reason(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let waiting = status.container_statuses.iter().flatten().filter_map(|container| {
        let state = container.state.clone()?;
        let waiting = state.waiting.map(|waiting| (waiting.reason, waiting.message));
        let (reason, message) = waiting.or_else(|| state.terminated.map(|ended| (ended.reason, ended.message)))?;
        Some(format!("{}: {}", reason.unwrap_or_default(), message.unwrap_or_default()))
    });
    let conditions = status.conditions.iter().flatten().filter(|condition| condition.status == "False");
    let conditions = conditions.filter_map(|condition| condition.message.clone());
    let all: Vec<_> = status.message.into_iter().chain(waiting).chain(conditions).collect();
    if all.is_empty() { "nobody has said why".into() } else { all.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::fake::{Answers, bound, path, volume};

    fn options() -> HelperOptions {
        HelperOptions {
            no_helper: false,
            helper_image: "pause".into(),
            runtime_class: "kata-zpod".into(),
            helper_timeout: Duration::from_secs(5),
        }
    }

    fn claim(mode: &str) -> Value {
        bound("db", mode).0
    }

    #[tokio::test]
    async fn a_pod_is_made_for_the_claim_and_removed_afterwards() {
        let (id, object) = volume("db", json!({"phase": "Ready"}));
        let claims = "/api/v1/namespaces/prod/persistentvolumeclaims/db";
        let answers = Answers::default()
            .with(claims, claim("Block"))
            .with(&path(&id), object)
            .with("/api/v1/persistentvolumes/pv", bound("db", "Block").1);
        let (cluster, options) = (answers.cluster(), options());
        let helper = Helper::new(&cluster, "prod".into(), "db".into(), &options);
        let pods = "/api/v1/namespaces/prod/pods";
        let running = json!({"metadata": {"name": helper.name}, "status": {"phase": "Running"}});
        let answers = answers.with(pods, running.clone()).with(&format!("{pods}/{}", helper.name), running);
        let volume = helper.start().await.unwrap();
        assert_eq!(volume.metadata.name, Some(id));
        helper.remove().await;
        let writes = answers.writes();
        let spec = &writes[0].body["spec"];
        assert_eq!(spec["runtimeClassName"], "kata-zpod");
        assert_eq!(spec["containers"][0]["volumeDevices"][0]["devicePath"], "/dev/zpod");
        assert!(spec["containers"][0].get("volumeMounts").is_none());
        assert_eq!(
            (writes[1].method.as_str(), writes[1].path.as_str()),
            ("DELETE", &*format!("{pods}/{}", helper.name))
        );
        assert!(Helper::is_one(&helper.name) && !Helper::is_one("zpod-transfer-db-0"));
    }

    #[tokio::test]
    async fn a_pod_that_does_not_start_is_quoted() {
        let claims = "/api/v1/namespaces/prod/persistentvolumeclaims/db";
        let answers = Answers::default().with(claims, claim("Filesystem"));
        let (cluster, options) = (answers.cluster(), options());
        let helper = Helper::new(&cluster, "prod".into(), "db".into(), &options);
        let pods = "/api/v1/namespaces/prod/pods";
        let pending = json!({"metadata": {"name": helper.name}, "status": {"phase": "Pending", "containerStatuses": [
            {"name": "hold", "image": "", "imageID": "", "ready": false, "restartCount": 0,
             "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}]}});
        let _answers = answers.with(pods, pending.clone()).with(&format!("{pods}/{}", helper.name), pending);
        tokio::time::pause();
        let failure = helper.start().await.unwrap_err();
        assert!(failure.to_string().contains("ErrImagePull: no such image"), "{failure}");
        assert_eq!(failure.kind.code(), 5);
    }
}
