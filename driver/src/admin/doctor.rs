//! What is right and wrong on a node: looked at, and nothing changed.

mod backing;
mod guests;
mod host;
mod kata;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::node::v1::RuntimeClass;
use kube::{Api, Client};
use zpod_admin::Check;
use zpod_storage::backing::late::LateBacking;

use crate::volumes::NodeVolumes;

/// For each question to the API server.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where things are on the node, as this process sees them.
#[derive(Debug, Clone)]
pub struct Places {
    /// Where the devices are.
    pub backing_dir: PathBuf,
    /// Where Kata looks for direct volumes.
    pub direct_volume_dir: PathBuf,
    /// Where Kata's shims have the directories of their sandboxes.
    pub kata_run_dirs: Vec<PathBuf>,
    /// Where the guest's kernel and initrd are: `vmlinuz` and `initrd`.
    pub guest_dir: PathBuf,
}

/// Looks at a node.
pub struct Doctor {
    places: Places,
    backing: Arc<LateBacking>,
    cluster: Option<(Client, Vec<String>)>,
}

impl std::fmt::Debug for Doctor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doctor").field("places", &self.places).finish_non_exhaustive()
    }
}

impl Doctor {
    /// Looks at these places, and at what the backing directory's file system was found to be able to do.
    pub fn new(places: Places, backing: Arc<LateBacking>) -> Self {
        Self { places, backing, cluster: None }
    }

    /// Looks for the RuntimeClasses of these handlers, too.
    #[must_use]
    pub fn in_cluster(self, client: Client, handlers: Vec<String>) -> Self {
        Self { cluster: Some((client, handlers)), ..self }
    }

    /// Everything there is to say, in the same order each time.
    pub(super) async fn look(&self, volumes: &NodeVolumes) -> Vec<Check> {
        let (places, abilities) = (self.places.clone(), self.backing.abilities());
        let on_disk = tokio::task::spawn_blocking(move || {
            let mut checks = backing::checks(&places.backing_dir, abilities);
            checks.extend(kata::checks(&places));
            checks.extend(host::checks());
            checks
        });
        let mut checks = on_disk.await.unwrap_or_else(|error| {
            vec![Check::fail("doctor", format!("the look at the node was cut short: {error}"), "ask again")]
        });
        if let Some((client, handlers)) = &self.cluster {
            checks.extend(runtime_classes(client, handlers).await);
        }
        checks.extend(backing::room(volumes).await);
        checks.extend(guests::checks(&volumes.looks(), volumes.node()));
        checks
    }
}

/// A RuntimeClass may have any name. One that is named as its handler is what zpod's chart makes.
async fn runtime_classes(client: &Client, handlers: &[String]) -> Vec<Check> {
    let name = "runtime-class";
    let classes: Api<RuntimeClass> = Api::all(client.clone());
    let mut checks = Vec::new();
    for handler in handlers {
        let remedy = "`kubectl get runtimeclass` lists those there are; zpod's chart makes them (runtimeClasses)";
        checks.push(match tokio::time::timeout(PATIENCE, classes.get_opt(handler)).await {
            Ok(Ok(Some(class))) if class.handler == *handler => {
                Check::ok(name, format!("RuntimeClass {handler} has the handler {handler}"))
            }
            Ok(Ok(Some(class))) => {
                let found = format!("RuntimeClass {handler} has the handler {}", class.handler);
                Check::warn(
                    name,
                    found,
                    format!("pods of it get no zpod volumes, unless that is among --runtime-handler; {remedy}"),
                )
            }
            Ok(Ok(None)) => Check::warn(
                name,
                format!("there is no RuntimeClass {handler}"),
                format!("one of another name may have that handler; {remedy}"),
            ),
            Ok(Err(error)) => Check::warn(
                name,
                format!("RuntimeClass {handler}: {error}"),
                "see whether the API server can be reached",
            ),
            Err(_) => Check::warn(
                name,
                format!("RuntimeClass {handler}: no answer in {PATIENCE:?}"),
                "see whether the API server can be reached",
            ),
        });
    }
    checks
}
