//! From a claim's creation until it is Bound.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use zpod_e2e::report::{Table, percentile};

use crate::driver::{Driver, Limits};
use crate::scaled;

/// Requests on their way to the API server at the same time.
pub(crate) const POSTING: usize = 32;
/// Longer than any run takes.
const DEADLINE: Duration = Duration::from_secs(400);
const ALONE: usize = 20;

/// How long each took, and all of them.
pub(crate) struct Run {
    pub(crate) millis: Vec<f64>,
    pub(crate) seconds: f64,
}

impl Run {
    pub(crate) fn per_second(&self) -> f64 {
        self.millis.len() as f64 / self.seconds
    }

    pub(crate) fn cell(&self) -> String {
        format!("{:.0} / {:.0}", percentile(&self.millis, 50), percentile(&self.millis, 99))
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "count": self.millis.len(),
            "millis": { "p50": percentile(&self.millis, 50), "p99": percentile(&self.millis, 99) },
            "perSecond": self.per_second(),
        })
    }
}

/// Both drivers, at each size, under the same limits of csi-provisioner.
pub(crate) async fn measure(client: &Client, drivers: &mut [Driver<'_>], limits: &[Limits]) -> Result<Vec<Value>> {
    let mut rows = Vec::new();
    for limits in limits {
        let title = format!("claims until Bound; csi-provisioner's limits {}; milliseconds, p50 / p99", limits.name);
        let head = ["claims", "driver", "create to Bound", "Bound/s", "deleted/s"];
        let mut table = Table::new(&title, &head);
        for driver in &mut *drivers {
            driver.limit(*limits).await?;
            warm_up(client, driver).await?;
        }
        for count in [0, 100, 1_000] {
            for driver in &*drivers {
                let (text, run) = if count == 0 {
                    (format!("{} alone", scaled(ALONE)), alone(client, driver, scaled(ALONE)).await?)
                } else {
                    (scaled(count).to_string(), together(client, driver, scaled(count)).await?)
                };
                let deleted = delete_all(client).await?;
                println!("  {text} {} {} ms, {:.1}/s", driver.name(), run.cell(), run.per_second());
                table.row(vec![
                    text,
                    driver.name().to_owned(),
                    run.cell(),
                    format!("{:.1}", run.per_second()),
                    format!("{deleted:.1}"),
                ]);
                rows.push(json!({
                    "limits": limits.name,
                    "driver": driver.name(),
                    "oneAfterAnother": count == 0,
                    "createToBound": run.json(),
                    "deletedPerSecond": deleted,
                }));
            }
        }
        table.print();
    }
    Ok(rows)
}

/// A claim that is not counted: csi-provisioner may have to become the leader first, and to see the node.
pub(crate) async fn warm_up(client: &Client, driver: &Driver<'_>) -> Result<()> {
    alone(client, driver, 1).await?;
    delete_all(client).await.map(drop)
}

/// All at once.
pub(crate) async fn together(client: &Client, driver: &Driver<'_>, count: usize) -> Result<Run> {
    let mut bound = Bound::watch(client).await?;
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(client.clone());
    let begun = Instant::now();
    let posting = stream::iter(0..count)
        .map(|number| post(&claims, driver.immediate(), format!("claim-{number}")))
        .buffer_unordered(POSTING)
        .try_collect::<HashMap<_, _>>();
    let (posted, ends) = tokio::try_join!(posting, bound.next(count))?;
    let millis = ends.iter().filter_map(|(name, end)| Some(since(*posted.get(name)?, *end))).collect();
    let last = ends.values().max().copied().unwrap_or(begun);
    Ok(Run { millis, seconds: last.duration_since(begun).as_secs_f64() })
}

/// One after another: what one takes when nothing is in its way.
async fn alone(client: &Client, driver: &Driver<'_>, count: usize) -> Result<Run> {
    let mut bound = Bound::watch(client).await?;
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(client.clone());
    let begun = Instant::now();
    let mut millis = Vec::new();
    for number in 0..count {
        let (_, posted) = post(&claims, driver.immediate(), format!("claim-{number}")).await?;
        let ends = bound.next(1).await?;
        millis.extend(ends.into_values().map(|end| since(posted, end)));
    }
    Ok(Run { millis, seconds: begun.elapsed().as_secs_f64() })
}

pub(crate) fn since(begin: Instant, end: Instant) -> f64 {
    end.duration_since(begin).as_secs_f64() * 1e3
}

/// Makes a claim; gives when that began.
pub(crate) async fn post(claims: &Api<PersistentVolumeClaim>, class: &str, name: String) -> Result<(String, Instant)> {
    let claim = serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "storageClassName": class, "accessModes": ["ReadWriteOncePod"],
            "resources": {"requests": {"storage": "256Mi"}},
        },
    }))?;
    let begun = Instant::now();
    claims.create(&PostParams::default(), &claim).await.with_context(|| format!("make {name}"))?;
    Ok((name, begun))
}

/// Deletes all claims and waits until they and their volumes are gone; how many per second.
pub(crate) async fn delete_all(client: &Client) -> Result<f64> {
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(client.clone());
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let count = volumes.list_metadata(&ListParams::default()).await?.items.len();
    let begun = Instant::now();
    claims.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    let one = ListParams::default().limit(1);
    loop {
        let left = volumes.list_metadata(&one).await?;
        if left.items.is_empty() && claims.list_metadata(&one).await?.items.is_empty() {
            return Ok(count as f64 / begun.elapsed().as_secs_f64());
        }
        if begun.elapsed() > DEADLINE {
            bail!("volumes are left after {DEADLINE:?}: {:?}", left.items.first().map(|volume| &volume.metadata.name));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Claims as they get Bound.
struct Bound {
    events: mpsc::UnboundedReceiver<(String, Instant)>,
    task: tokio::task::JoinHandle<()>,
}

impl Bound {
    async fn watch(client: &Client) -> Result<Self> {
        let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(client.clone());
        let (sender, events) = mpsc::unbounded_channel();
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let task = tokio::spawn(async move {
            let mut ready = Some(ready);
            let mut seen = std::collections::HashSet::new();
            let mut stream = std::pin::pin!(watcher(claims, watcher::Config::default()));
            while let Some(event) = stream.next().await {
                let now = Instant::now();
                match event {
                    Ok(Event::InitDone) => drop(ready.take().map(|ready| ready.send(()))),
                    Ok(Event::Apply(claim) | Event::InitApply(claim)) => {
                        let is_bound = claim.status.and_then(|status| status.phase).as_deref() == Some("Bound");
                        let name = claim.metadata.name.unwrap_or_default();
                        if is_bound && seen.insert(name.clone()) {
                            // Nobody listens when the run has ended.
                            let _ = sender.send((name, now));
                        }
                    }
                    Ok(_) => {}
                    Err(error) => eprintln!("watch of claims: {error}"),
                }
            }
        });
        is_ready.await.context("watch claims")?;
        Ok(Self { events, task })
    }

    /// The next `count`, and when they were.
    async fn next(&mut self, count: usize) -> Result<HashMap<String, Instant>> {
        let mut ends = HashMap::new();
        while ends.len() < count {
            let event = tokio::time::timeout(DEADLINE, self.events.recv()).await;
            let event = event.with_context(|| format!("{} of {count} claims are Bound", ends.len()))?;
            ends.extend(event);
        }
        Ok(ends)
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.task.abort();
    }
}
