use std::fmt;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::task::JoinHandle;
use zpod_kubernetes::READY;
use zpod_kubernetes::crd::ZfsNode;
use zpod_volume::{Bytes, Vdevs};

use crate::volumes::Room;

/// How long the first list of nodes is waited for at most.
const FIRST_LIST: Duration = Duration::from_secs(30);

/// The nodes of the cluster and the room they have: a few hundred bytes for each, kept up to date by a watch.
pub struct Nodes {
    store: Store<ZfsNode>,
    task: JoinHandle<()>,
}

impl fmt::Debug for Nodes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Nodes").field("nodes", &self.store.len()).finish()
    }
}

impl Nodes {
    /// Starts to watch them.
    pub fn watch(client: Client) -> Self {
        let (store, writer) = reflector::store();
        let nodes: Api<ZfsNode> = Api::all(client);
        let stream = watcher(nodes, watcher::Config::default())
            .default_backoff()
            .modify(|node| node.metadata.managed_fields = None)
            .reflect(writer);
        let task = tokio::spawn(async move {
            let mut stream = std::pin::pin!(stream);
            while let Some(event) = stream.next().await {
                if let Err(error) = event {
                    tracing::warn!("ZfsNodes can't be watched now: {error}");
                }
            }
        });
        Self { store, task }
    }

    /// Waits until they have been listed once.
    ///
    /// # Errors
    /// When that takes too long.
    pub async fn listed(&self) -> Result<(), String> {
        match tokio::time::timeout(FIRST_LIST, self.store.wait_until_ready()).await {
            Ok(Ok(())) => Ok(()),
            _ => {
                Err("the ZfsNodes have not been listed yet: the Kubernetes API server can't be asked, or refuses"
                    .into())
            }
        }
    }

    /// The room on a node, or on the one that has most, for volumes with so many devices.
    pub fn room(&self, node: Option<&str>, vdevs: Vdevs) -> Room {
        match node {
            Some(node) => self.store.get(&ObjectRef::new(node)).map(|node| room(&node, vdevs)).unwrap_or_default(),
            None => {
                let rooms = self.store.state();
                rooms.iter().map(|node| room(node, vdevs)).max_by_key(|room| room.largest).unwrap_or_default()
            }
        }
    }

    /// The node for a new volume: the first of the allowed ones that has the room; of all, the one with most.
    ///
    /// # Errors
    /// What each of them lacks.
    pub fn choose(&self, allowed: Option<&[String]>, capacity: Bytes, vdevs: Vdevs) -> Result<String, String> {
        let room = |node: &ZfsNode| room(node, vdevs);
        let lacks = |name: &str| match self.store.get(&ObjectRef::new(name)) {
            None => Some(format!("{name} has no ZfsNode: zpod-node has never run there")),
            Some(node) if !is_ready(&node) => {
                Some(format!("{name} is not ready; `kubectl describe zfsnode {name}` says why"))
            }
            Some(node) if room(&node).largest < capacity => {
                Some(format!("{name} has room for {} at most, {capacity} is asked for", room(&node).largest))
            }
            Some(_) => None,
        };
        if let Some(allowed) = allowed {
            let mut all = Vec::new();
            for name in allowed {
                match lacks(name) {
                    None => return Ok(name.clone()),
                    Some(reason) => all.push(reason),
                }
            }
            return Err(if all.is_empty() {
                "none of the topologies asked for is a node of ours".into()
            } else {
                all.join("; ")
            });
        }
        let state = self.store.state();
        let best = state.iter().filter(|node| is_ready(node)).max_by_key(|node| room(node).available);
        let name = best.and_then(|node| node.metadata.name.clone());
        let name = name.ok_or("there is no ZfsNode that is ready: zpod-node runs on no node")?;
        lacks(&name).map_or(Ok(name), Err)
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn room(node: &ZfsNode, vdevs: Vdevs) -> Room {
    let backing = node.status.as_ref().and_then(|status| match vdevs {
        Vdevs::Single => status.backing.as_ref(),
        Vdevs::Mirror2 => status.mirrors.as_ref(),
    });
    match backing {
        Some(backing) if is_ready(node) => Room { available: backing.available.0, largest: backing.largest.0 },
        _ => Room::default(),
    }
}

fn is_ready(node: &ZfsNode) -> bool {
    let conditions = node.status.as_ref().map_or(&[][..], |status| &status.conditions);
    conditions.iter().any(|condition| condition.type_ == READY && condition.status == "True")
}
