use std::io::{BufRead as _, IsTerminal as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, Preconditions};
use serde::Serialize;
use tokio::time::{Instant, timeout};
use uuid::Uuid;
use zpod_admin::{RollbackPlan, RollbackQuery, RollbackRequested};
use zpod_kubernetes::crd::{Pod as PodStatus, RollbackState, RollbackStatus, ZfsVolume};
use zpod_volume::VolumeId;

use super::helper::Helper;
use super::transfer::{Reached, Way, until_signal, with_guest};
use crate::admin::{Admin, Line};
use crate::cluster::Cluster;
use crate::options::{Format, Named, Rollback};
use crate::output::show;
use crate::text::size;
use crate::{Failure, Kind, progress};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Newer snapshots that a question names.
const NAMED: usize = 20;
/// How long it is tried to take back what may have been asked for.
const TAKING_BACK: Duration = Duration::from_secs(20);
/// Who makes a pod anew that is ended. A Job does not always, and what others do is not known.
const MAKERS: [(&str, &str); 4] =
    [("apps/v1", "ReplicaSet"), ("apps/v1", "StatefulSet"), ("apps/v1", "DaemonSet"), ("v1", "ReplicationController")];

/// What was asked for, and what came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    volume: String,
    #[serde(flatten)]
    requested: RollbackRequested,
    /// What it destroys, and how much was written since.
    #[serde(skip_serializing_if = "Option::is_none")]
    plan: Option<RollbackPlan>,
    /// As `status.rollback.state` of the ZfsVolume, or `Canceled`.
    state: String,
    /// Why it was refused.
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

impl Outcome {
    fn asked(id: VolumeId, requested: RollbackRequested, plan: RollbackPlan) -> Self {
        let (volume, message) = (id.to_string(), String::new());
        Self { volume, requested, plan: Some(plan), state: "Pending".into(), message }
    }

    fn text(&self, name: &str) -> String {
        let snapshot = &self.requested.snapshot;
        match self.state.as_str() {
            "Pending" => format!("{name} goes back to snapshot {snapshot} at its next start\n"),
            "RolledBack" => format!("{name} is at snapshot {snapshot} again\n"),
            "Canceled" if self.requested.given => format!(
                "{name} does not go back to snapshot {snapshot} any more; a pod that has ended may have gone back already: look \
                 at the data\n"
            ),
            "Canceled" => format!("{name} does not go back to snapshot {snapshot}\n"),
            _ => format!("{name} did not go back to snapshot {snapshot}, and is as it was\n"),
        }
    }
}

/// A request, from before it is sent.
#[derive(Debug)]
struct Request {
    id: Uuid,
    /// The UID of the pod that had the volume when it was looked at.
    pod: Mutex<Option<String>>,
    /// Of which volume, once it may have reached the node.
    sent: OnceLock<VolumeId>,
    refused: AtomicBool,
    asked: OnceLock<Outcome>,
}

impl Request {
    fn new() -> Self {
        let (pod, sent, refused, asked) = Default::default();
        Self { id: Uuid::new_v4(), pod, sent, refused, asked }
    }

    /// Notes who has the volume.
    fn saw(&self, volume: &ZfsVolume) {
        let publication = volume.status.as_ref().and_then(|status| status.publication.as_ref());
        let uid = publication.and_then(|publication| publication.pod.as_ref()).map(|pod| pod.uid.clone());
        *self.pod.lock().unwrap_or_else(PoisonError::into_inner) = Some(uid.unwrap_or_default());
    }

    fn seen(&self) -> Option<String> {
        self.pod.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The failure of a request, which may be recorded all the same: then it is taken back.
    async fn failed(
        &self,
        line: impl Future<Output = Result<Line, Failure>>,
        named: &Named,
        failure: Failure,
    ) -> Failure {
        match self.sent.get().filter(|_| !self.refused.load(Ordering::Relaxed)) {
            Some(id) => take_back(line, *id, self.id, named, failure).await,
            None => failure,
        }
    }
}

fn how_to_cancel(named: &Named) -> String {
    match named {
        Named::Claim(claim) => format!("`kubectl zpod rollback {claim} --cancel` takes it back"),
        Named::Id(id) => format!("`kubectl zpod rollback --volume {id} --cancel` takes it back"),
    }
}

/// Takes a request back behind a failure, and says how that went.
async fn take_back(
    line: impl Future<Output = Result<Line, Failure>>,
    id: VolumeId,
    request: Uuid,
    named: &Named,
    failure: Failure,
) -> Failure {
    let canceled = until_signal(async { Admin::new(line.await?).cancel_rollback(id, Some(request)).await });
    match timeout(TAKING_BACK, canceled).await {
        Ok(Ok(_)) => Failure::new(
            failure.kind,
            format!("{}; the rollback was taken back", failure.what()),
            "look again and ask again",
        ),
        Ok(Err(_)) | Err(_) => {
            Failure::new(failure.kind, format!("{}; it may be asked for", failure.what()), how_to_cancel(named))
        }
    }
}

/// Asks for a rollback, and ends the pod that has the volume where that is said.
pub(super) async fn run(cluster: &Cluster, options: &Rollback, format: Format) -> Result<(), Failure> {
    if options.cancel {
        let named = options.whole()?;
        let volume = cluster.volume(&named).await?;
        let id = id_of(&volume)?;
        let line = Line::to_node(cluster, &volume.spec.node_name).await?;
        return cancel(line, id, &named, format).await;
    }
    let (named, _) = options.meant()?;
    let volume = cluster.volume(&named).await?;
    let pod = match user_of(&volume) {
        Some(pod) if !options.restart => return Err(in_use(&named, pod)),
        Some(pod) => Some(replaceable(cluster, pod).await?),
        None => None,
    };
    let request = Request::new();
    let ends = pod.as_ref().and_then(|pod| pod.metadata.name.as_deref());
    let done = with_guest(
        Way::Cluster(cluster),
        &named,
        &options.helper,
        |now| match user_of(now).filter(|user| !pod.as_ref().is_some_and(|pod| is_same(pod, user))) {
            // Another one has come since.
            Some(other) => Err(in_use(&named, other)),
            None => {
                request.saw(now);
                Ok(())
            }
        },
        |reached| ask(reached, options, ends, &request),
    )
    .await;
    if let Err(failure) = done {
        return Err(request.failed(Line::to_node(cluster, &volume.spec.node_name), &named, failure).await);
    }
    let Some(mut outcome) = request.asked.into_inner() else { return Ok(()) };
    let mut refused = false;
    if let Some(pod) = pod {
        let told = restart(cluster, &pod, &outcome, &named, options.timeout).await?;
        refused = told.state != RollbackState::RolledBack;
        (outcome.state, outcome.message) = (format!("{:?}", told.state), told.message);
    }
    show(format, &outcome, || outcome.text(&named.to_string()))?;
    if !refused {
        return Ok(());
    }
    let why =
        if outcome.message.is_empty() { "the guest refused, and has not said why".into() } else { outcome.message };
    Err(Failure::failed(why, "mend that, and ask once more"))
}

/// Ends the pod, and waits for what comes of the next one.
async fn restart(
    cluster: &Cluster,
    pod: &Pod,
    outcome: &Outcome,
    named: &Named,
    patience: Duration,
) -> Result<RollbackStatus, Failure> {
    let told = until_signal(async {
        end(cluster, pod, outcome, named).await?;
        wait(cluster, outcome, patience).await
    });
    told.await.map_err(|failure| match failure.kind {
        Kind::Interrupted => {
            let what = format!("{}; the rollback is asked for, and the next pod's start does it", failure.what());
            Failure::new(Kind::Interrupted, what, format!("until then, {}", how_to_cancel(named)))
        }
        _ => failure,
    })
}

/// The same without a cluster.
pub(super) async fn of_socket(line: Line, options: &Rollback, format: Format) -> Result<(), Failure> {
    if options.restart {
        return Err(Failure::usage("without a cluster there are no pods to end", "leave --restart out"));
    }
    if options.cancel {
        let named = options.whole()?;
        return cancel(line, named.on_one_machine()?, &named, format).await;
    }
    let (named, _) = options.meant()?;
    let (request, again) = (Request::new(), line.socket());
    let work = |reached| ask(reached, options, None, &request);
    if let Err(failure) = with_guest(Way::Socket(line), &named, &options.helper, |_| Ok(()), work).await {
        let again = async { again.ok_or_else(|| Failure::failed("there is no socket", "")) };
        return Err(request.failed(again, &named, failure).await);
    }
    let Some(outcome) = request.asked.into_inner() else { return Ok(()) };
    show(format, &outcome, || outcome.text(&named.to_string()))
}

async fn cancel(line: Line, id: VolumeId, named: &Named, format: Format) -> Result<(), Failure> {
    let requested = Admin::new(line).cancel_rollback(id, None).await?;
    let (volume, state, message) = (id.to_string(), "Canceled".to_owned(), String::new());
    let outcome = Outcome { volume, requested, plan: None, state, message };
    show(format, &outcome, || outcome.text(&named.to_string()))
}

fn id_of(volume: &ZfsVolume) -> Result<VolumeId, Failure> {
    let name = volume.metadata.name.clone().unwrap_or_default();
    name.parse().map_err(|_| Failure::failed(format!("{name} is not the id of a volume"), ""))
}

/// The pod that uses a volume, if that is none of this program's own.
fn user_of(volume: &ZfsVolume) -> Option<&PodStatus> {
    let pod = volume.status.as_ref()?.publication.as_ref()?.pod.as_ref()?;
    (!Helper::is_one(&pod.name)).then_some(pod)
}

fn in_use(named: &Named, pod: &PodStatus) -> Failure {
    Failure::failed(
        format!("pod {}/{} uses {named}, and a volume goes back only at a start", pod.namespace, pod.name),
        "--restart ends the pod, for its owner to make it anew; or end it yourself first, such as by replicas: 0",
    )
}

/// Whether a pod is that which uses the volume.
fn is_same(pod: &Pod, user: &PodStatus) -> bool {
    let uid = user.uid.is_empty() || pod.metadata.uid.as_deref() == Some(user.uid.as_str());
    uid && pod.metadata.name.as_deref() == Some(user.name.as_str())
}

/// The pod, if somebody makes it anew.
async fn replaceable(cluster: &Cluster, user: &PodStatus) -> Result<Pod, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &user.namespace);
    let pod = pods.get(&user.name).await.map_err(|error| Failure::api("the pod that uses it", &error))?;
    let mut owners = pod.metadata.owner_references.iter().flatten();
    let owned = owners.any(|owner| {
        owner.controller == Some(true) && MAKERS.contains(&(owner.api_version.as_str(), owner.kind.as_str()))
    });
    match (is_same(&pod, user), owned) {
        (true, true) => Ok(pod),
        (false, _) => Err(Failure::failed(
            format!("pod {}/{} is another one than that which uses the volume", user.namespace, user.name),
            "try again in a moment",
        )),
        (true, false) => Err(Failure::failed(
            format!("pod {}/{} has no owner that would make it anew", user.namespace, user.name),
            "delete it yourself, then ask without --restart, and make it again",
        )),
    }
}

/// Has the guest look, asks whoever is there, and then the node.
async fn ask(reached: Reached, options: &Rollback, ends: Option<&str>, request: &Request) -> Result<(), Failure> {
    let (named, snapshot) = options.meant()?;
    let query = RollbackQuery { snapshot, destroy_newer: options.destroy_newer, id: None, pod: None };
    let plan = reached.admin.rollback_plan(reached.id, &query).await?;
    if !options.yes {
        confirm(&question(&named.to_string(), &plan, ends)).await?;
    }
    let query = RollbackQuery { id: Some(request.id), pod: request.seen(), ..query };
    let _ = request.sent.set(reached.id);
    match reached.admin.rollback(reached.id, &query).await {
        Ok(requested) => {
            let _ = request.asked.set(Outcome::asked(reached.id, requested, plan));
            Ok(())
        }
        Err((failure, refused)) => {
            request.refused.store(refused, Ordering::Relaxed);
            Err(failure)
        }
    }
}

fn question(name: &str, plan: &RollbackPlan, ends: Option<&str>) -> String {
    let mut text = format!("{name} goes back to snapshot {} at its next start:\n", plan.snapshot);
    text.push_str(&format!("  {} written since then are lost\n", size(plan.written_bytes)));
    if !plan.newer.is_empty() {
        let more = plan.left_out.saturating_add(plan.newer.len().saturating_sub(NAMED) as u64);
        let names = plan.newer.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        text.push_str(&format!("  newer snapshots are destroyed: {names}{more}\n"));
    }
    if let Some(pod) = ends {
        text.push_str(&format!("  pod {pod} is ended now, and its owner makes another one\n"));
    }
    text
}

async fn confirm(question: &str) -> Result<(), Failure> {
    eprint!("{question}");
    if !std::io::stdin().is_terminal() {
        return Err(Failure::usage("stdin is no terminal, and nobody can be asked", "--yes goes on without asking"));
    }
    eprint!("Go on? [y/N] ");
    let (sender, answer) = tokio::sync::oneshot::channel();
    // A thread of its own: the end of this program does not wait for it.
    std::thread::spawn(move || {
        let mut line = String::new();
        let _ = std::io::stdin().lock().read_line(&mut line);
        let _ = sender.send(line);
    });
    match answer.await.unwrap_or_default().trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(Failure::failed("nothing was asked for, and nothing is changed", "")),
    }
}

/// Ends a pod as `kubectl delete pod` does: that one, and no other of its name.
async fn end(cluster: &Cluster, pod: &Pod, outcome: &Outcome, named: &Named) -> Result<(), Failure> {
    let (name, namespace) = (pod.metadata.name.clone().unwrap_or_default(), pod.metadata.namespace.clone());
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace.as_deref().unwrap_or_default());
    let preconditions = Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match pods.delete(&name, &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
            replaced(cluster, &name, outcome, named).await
        }
        Err(error) => {
            let what = format!("the rollback is asked for, and pod {name} can't be ended");
            let failure = Failure::api(&what, &error);
            Err(Failure::failed(failure.what(), "end it yourself, or take it back with --cancel"))
        }
    }
}

/// Goes on where the pod that has come in its place was started with the request. Otherwise that one may write what nobody has
/// said yes to lose.
async fn replaced(cluster: &Cluster, pod: &str, outcome: &Outcome, named: &Named) -> Result<(), Failure> {
    let what = format!("pod {pod} has ended meanwhile, or is another one by now");
    let id = |id: &str| id.parse::<Uuid>().unwrap_or_default();
    let request = id(&outcome.requested.id);
    let volume = cluster.volumes().get(&outcome.volume).await;
    let status = volume.as_ref().ok().and_then(|volume| volume.status.as_ref());
    let told = status.and_then(|status| status.publication.as_ref()?.rollback) == Some(request);
    let done = status.and_then(|status| status.rollback.as_ref());
    if told || done.is_some_and(|done| done.id == request && done.state != RollbackState::Pending) {
        return Ok(());
    }
    let failure = Failure::failed(what, "");
    match (volume, outcome.volume.parse()) {
        (Ok(volume), Ok(id)) => {
            let line = Line::to_node(cluster, &volume.spec.node_name);
            Err(take_back(line, id, request, named, failure).await)
        }
        _ => Err(Failure::failed(format!("{}; the rollback is asked for", failure.what()), how_to_cancel(named))),
    }
}

async fn wait(cluster: &Cluster, outcome: &Outcome, patience: Duration) -> Result<RollbackStatus, Failure> {
    let bar = progress::waiting("waiting for the next pod");
    let (begun, mut failed) = (Instant::now(), false);
    loop {
        match cluster.volumes().get(&outcome.volume).await {
            Ok(volume) => {
                failed = false;
                let told = volume.status.and_then(|status| status.rollback);
                match told.filter(|told| told.id.to_string() == outcome.requested.id) {
                    Some(told) if told.state != RollbackState::Pending => {
                        bar.finish_and_clear();
                        return Ok(told);
                    }
                    Some(_) => {}
                    None => {
                        bar.finish_and_clear();
                        let what = "the rollback was taken back meanwhile, or another one was asked for in its place";
                        return Err(Failure::failed(what, "`kubectl zpod status` says what is asked for now"));
                    }
                }
            }
            // Once, it may be the API server that starts anew.
            Err(_) if !std::mem::replace(&mut failed, true) => {}
            Err(error) => {
                bar.finish_and_clear();
                let failure = Failure::api("the rollback is asked for; the volume can't be read", &error);
                return Err(Failure::failed(failure.what(), "`kubectl zpod status` says what came of it"));
            }
        }
        if begun.elapsed() >= patience {
            bar.finish_and_clear();
            let what = format!("the pod was ended, and no other one has gone back in {} s", patience.as_secs());
            let remedy =
                "it does with its start: `kubectl get pods` shows what keeps it, `kubectl zpod status` what came of it";
            return Err(Failure::timed_out(what, remedy));
        }
        tokio::time::sleep(LOOK_EVERY.min(patience)).await;
    }
}

#[cfg(test)]
mod tests;
