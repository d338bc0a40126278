use std::io::{BufRead as _, IsTerminal as _};
use std::sync::OnceLock;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{DeleteParams, Preconditions};
use serde::Serialize;
use tokio::time::Instant;
use zpod_admin::{RollbackPlan, RollbackQuery, RollbackRequested};
use zpod_kubernetes::crd::{Pod as PodStatus, RollbackState, RollbackStatus, ZfsVolume};
use zpod_volume::VolumeId;

use super::helper::Helper;
use super::transfer::{Reached, Way, with_guest};
use crate::admin::{Admin, Line};
use crate::cluster::Cluster;
use crate::options::{Format, Named, Rollback};
use crate::output::show;
use crate::text::size;
use crate::{Failure, progress};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Newer snapshots that a question names.
const NAMED: usize = 20;

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
            "Canceled" => format!("{name} does not go back to snapshot {snapshot}\n"),
            _ => format!("{name} did not go back to snapshot {snapshot}, and is as it was\n"),
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
    let asked = OnceLock::new();
    let ends = pod.as_ref().and_then(|pod| pod.metadata.name.as_deref());
    with_guest(
        Way::Cluster(cluster),
        &named,
        &options.helper,
        |now| match user_of(now).filter(|user| ends != Some(user.name.as_str())) {
            // Another one has come since.
            Some(other) => Err(in_use(&named, other)),
            None => Ok(()),
        },
        |reached| ask(reached, options, ends, &asked),
    )
    .await?;
    let Some(mut outcome) = asked.into_inner() else { return Ok(()) };
    if let Some(pod) = pod {
        end(cluster, &pod).await?;
        let told = wait(cluster, &outcome, options.timeout).await?;
        (outcome.state, outcome.message) = (format!("{:?}", told.state), told.message);
    }
    show(format, &outcome, || outcome.text(&named.to_string()))?;
    match outcome.message.is_empty() {
        true => Ok(()),
        false => Err(Failure::failed(outcome.message, "mend that, and ask once more")),
    }
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
    let asked = OnceLock::new();
    with_guest(Way::Socket(line), &named, &options.helper, |_| Ok(()), |reached| ask(reached, options, None, &asked))
        .await?;
    let Some(outcome) = asked.into_inner() else { return Ok(()) };
    show(format, &outcome, || outcome.text(&named.to_string()))
}

async fn cancel(line: Line, id: VolumeId, named: &Named, format: Format) -> Result<(), Failure> {
    let requested = Admin::new(line).cancel_rollback(id).await?;
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

/// The pod, if somebody makes it anew.
async fn replaceable(cluster: &Cluster, user: &PodStatus) -> Result<Pod, Failure> {
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), &user.namespace);
    let pod = pods.get(&user.name).await.map_err(|error| Failure::api("the pod that uses it", &error))?;
    let same = user.uid.is_empty() || pod.metadata.uid.as_deref() == Some(user.uid.as_str());
    let owners = pod.metadata.owner_references.iter().flatten();
    // The kubelet that shows a static pod makes no other one for its mirror.
    let owned = owners.into_iter().any(|owner| owner.controller == Some(true) && owner.kind != "Node");
    match (same, owned) {
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
async fn ask(
    reached: Reached,
    options: &Rollback,
    ends: Option<&str>,
    asked: &OnceLock<Outcome>,
) -> Result<(), Failure> {
    let (named, snapshot) = options.meant()?;
    let query = RollbackQuery { snapshot, destroy_newer: options.destroy_newer };
    let plan = reached.admin.rollback_plan(reached.id, &query).await?;
    if !options.yes {
        confirm(&question(&named.to_string(), &plan, ends)).await?;
    }
    let requested = reached.admin.rollback(reached.id, &query).await?;
    let _ = asked.set(Outcome::asked(reached.id, requested, plan));
    Ok(())
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
async fn end(cluster: &Cluster, pod: &Pod) -> Result<(), Failure> {
    let (name, namespace) = (pod.metadata.name.clone().unwrap_or_default(), pod.metadata.namespace.clone());
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace.as_deref().unwrap_or_default());
    let preconditions = Preconditions { uid: pod.metadata.uid.clone(), ..Preconditions::default() };
    let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
    match pods.delete(&name, &params).await {
        Ok(_) => Ok(()),
        // It has ended by itself: another one of the name is a start already.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        Err(error) => {
            let what = format!("the rollback is asked for, and pod {name} can't be ended");
            let failure = Failure::api(&what, &error);
            Err(Failure::failed(failure.what(), "end it yourself, or take it back with --cancel"))
        }
    }
}

async fn wait(cluster: &Cluster, outcome: &Outcome, patience: Duration) -> Result<RollbackStatus, Failure> {
    let bar = progress::waiting("waiting for the next pod");
    let begun = Instant::now();
    loop {
        let volume = cluster.volumes().get(&outcome.volume).await;
        let volume = volume.map_err(|error| Failure::api("the volume", &error))?;
        let told = volume.status.and_then(|status| status.rollback);
        let told = told.filter(|told| told.id.to_string() == outcome.requested.id);
        if let Some(told) = told.filter(|told| told.state != RollbackState::Pending) {
            bar.finish_and_clear();
            return Ok(told);
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
