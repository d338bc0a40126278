//! The two drivers that are measured side by side.

use std::collections::HashMap;
use std::time::Instant;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE;
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::{IMAGES, NAMESPACE, chart};

use crate::NODE;
use crate::floor::Floor;

/// How much csi-provisioner may do at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) name: &'static str,
    pub(crate) workers: u32,
    pub(crate) qps: u32,
    pub(crate) burst: u32,
}

/// What the chart sets.
pub(crate) const CHART: Limits = Limits { name: "as in the chart", workers: 32, qps: 50, burst: 100 };
/// As if there were none: what is measured is not csi-provisioner's patience.
pub(crate) const UNLIMITED: Limits = Limits { name: "unlimited", workers: 32, qps: 10_000, burst: 10_000 };

/// Who makes the volumes.
pub(crate) enum Driver<'a> {
    Floor(Box<Floor>),
    Zpod(&'a Cluster),
}

impl Driver<'_> {
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Floor(_) => "floor",
            Self::Zpod(_) => "zpod",
        }
    }

    /// Its StorageClass whose volumes wait for no pod.
    pub(crate) fn immediate(&self) -> &'static str {
        match self {
            Self::Floor(_) => "floor-immediate",
            Self::Zpod(_) => "zpod-immediate",
        }
    }

    /// Its StorageClass whose volumes wait for a pod.
    pub(crate) fn waiting(&self) -> &'static str {
        self.name()
    }

    pub(crate) async fn limit(&mut self, limits: Limits) -> Result<()> {
        match self {
            Self::Floor(floor) => floor.limit(limits),
            Self::Zpod(cluster) => upgrade(cluster, limits).await,
        }
    }

    /// When each target path was found published that wasn't in `known`. Of zpod: when its direct volume is there,
    /// which is the last thing that NodePublishVolume does but for answering.
    pub(crate) fn published(&self, known: &mut HashMap<String, Instant>) -> Result<()> {
        match self {
            Self::Floor(floor) => known.extend(floor.published()),
            Self::Zpod(cluster) => {
                let dir = cluster.node_dir(NODE).join("run/kata-containers/shared/direct-volumes");
                for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))?.flatten() {
                    let target = BASE64_URL_SAFE.decode(entry.file_name().as_encoded_bytes()).unwrap_or_default();
                    known.entry(String::from_utf8_lossy(&target).into_owned()).or_insert_with(Instant::now);
                }
            }
        }
        Ok(())
    }
}

async fn upgrade(cluster: &Cluster, limits: Limits) -> Result<()> {
    let chart = chart().display().to_string();
    let settings = format!(
        // Thousands of sparse volumes: what they could take is not what is measured.
        "{IMAGES},node.overprovision=1000,provisioner.workerThreads={},provisioner.kubeApiQps={},provisioner.kubeApiBurst={}",
        limits.workers, limits.qps, limits.burst
    );
    let arguments = ["upgrade", "zpod", &chart, "-n", NAMESPACE, "--set", &settings, "--wait", "--timeout", "4m"];
    cluster.helm(&arguments).await.map(drop)
}
