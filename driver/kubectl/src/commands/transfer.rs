//! What `send` and `receive` share: the way to a guest that runs the volume.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;
use zpod_kubernetes::crd::{RollbackState, ZfsVolume};
use zpod_volume::VolumeId;

use super::helper::Helper;
use crate::admin::{Admin, Line, Trouble};
use crate::cluster::Cluster;
use crate::options::{HelperOptions, Named};
use crate::{Failure, Kind, progress};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A volume whose guest can be asked.
pub(super) struct Reached {
    pub(super) admin: Admin,
    pub(super) id: VolumeId,
}

/// Who is asked: a cluster, or one machine.
pub(super) enum Way<'a> {
    Cluster(&'a Cluster),
    Socket(Line),
}

/// Does the work on a volume that runs. Where no pod has it, one is made for that time, and removed whatever happens.
pub(super) async fn with_guest<F: Future<Output = Result<(), Failure>>>(
    way: Way<'_>,
    named: &Named,
    options: &HelperOptions,
    allowed: impl Fn(&ZfsVolume) -> Result<(), Failure>,
    work: impl FnOnce(Reached) -> F,
) -> Result<(), Failure> {
    let cluster = match way {
        Way::Socket(line) => {
            let id = named.on_one_machine()?;
            let admin = Admin::new(line);
            admin.send_points(id).await?;
            return until_signal(work(Reached { admin, id })).await;
        }
        Way::Cluster(cluster) => cluster,
    };
    let volume = match named {
        Named::Id(_) => Some(cluster.volume(named).await?),
        Named::Claim(name) => match cluster.claim(name).await? {
            // Not bound yet: its first pod makes it, and that may be ours.
            claim if unbound(&claim) => None,
            claim => Some(cluster.volume_of(&claim).await?),
        },
    };
    if let Some(volume) = &volume {
        allowed(volume)?;
        if volume.status.as_ref().is_some_and(|status| status.publication.is_some()) {
            let reached = reach(cluster, volume, options.helper_timeout).await?;
            return until_signal(work(reached)).await;
        }
    }
    volume.as_ref().map_or(Ok(()), |volume| goes_nowhere(volume, named))?;
    if options.no_helper {
        let what = format!("no pod uses {named}, and only a running guest can open its pool");
        return Err(Failure::failed(what, "start its pod, or leave --no-helper out: a pod is made for that time then"));
    }
    let claim = match (volume.as_ref().map(|volume| volume.spec.claim.as_ref()), named) {
        (_, Named::Claim(name)) => (cluster.namespace.clone(), name.clone()),
        (Some(Some(claim)), _) => (claim.namespace.clone(), claim.name.clone()),
        _ => return Err(Failure::failed(format!("volume {named} has no claim that a pod could use"), "")),
    };
    let helper = Helper::new(cluster, claim.0, claim.1, options);
    let done = until_signal(async {
        let started = helper.start().await?;
        // The claim may have been made anew, or be bound to another volume than the id that was given.
        if volume.as_ref().is_some_and(|volume| volume.metadata.name != started.metadata.name) {
            let found = started.metadata.name.unwrap_or_default();
            let what = format!("the claim of {named} has another volume now: {found}");
            return Err(Failure::failed(what, "`kubectl zpod status -A` says which claim has which volume"));
        }
        // What was looked at before was another volume, or this one before the pod.
        allowed(&started)?;
        work(reach(cluster, &started, options.helper_timeout).await?).await
    })
    .await;
    helper.remove().await;
    done
}

/// A pod of this program's own would be the start with which a volume goes back, and nobody has asked for that now.
fn goes_nowhere(volume: &ZfsVolume, named: &Named) -> Result<(), Failure> {
    let rollback = volume.status.as_ref().and_then(|status| status.rollback.as_ref());
    match rollback.filter(|rollback| rollback.state == RollbackState::Pending) {
        None => Ok(()),
        Some(rollback) => Err(Failure::failed(
            format!(
                "{named} goes back to snapshot {} with its next pod, and one made for this would be that",
                rollback.snapshot
            ),
            format!("start its pod first, or take it back: kubectl zpod rollback {named} --cancel"),
        )),
    }
}

fn unbound(claim: &k8s_openapi::api::core::v1::PersistentVolumeClaim) -> bool {
    claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).unwrap_or_default().is_empty()
}

/// The way to the guest, once it answers: it may be starting.
async fn reach(cluster: &Cluster, volume: &ZfsVolume, patience: Duration) -> Result<Reached, Failure> {
    let name = volume.metadata.name.clone().unwrap_or_default();
    let id = name.parse().map_err(|_| Failure::failed(format!("{name} is not the id of a volume"), ""))?;
    let admin = Admin::new(Line::to_node(cluster, &volume.spec.node_name).await?);
    let bar = progress::waiting("waiting for the guest");
    let begun = Instant::now();
    loop {
        match admin.send_points(id).await {
            Ok(_) => break,
            Err(Trouble::NotNow(_)) if begun.elapsed() < patience => tokio::time::sleep(LOOK_EVERY).await,
            Err(trouble) => {
                bar.finish_and_clear();
                return Err(trouble.into());
            }
        }
    }
    bar.finish_and_clear();
    Ok(Reached { admin, id })
}

/// Ends the work at Ctrl-C, so that what was made for it can be removed.
pub(super) async fn until_signal<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let signals = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = signals else { return work.await };
    tokio::select! {
        done = work => done,
        _ = interrupt.recv() => Err(Failure::new(Kind::Interrupted, "interrupted", "")),
        _ = terminate.recv() => Err(Failure::new(Kind::Interrupted, "told to end", "")),
    }
}
