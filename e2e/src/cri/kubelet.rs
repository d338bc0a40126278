//! The node's kubelet: its configuration and its start.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::process::Process;

/// What a kubelet has to know.
#[derive(Debug)]
pub(super) struct Kubelet<'a> {
    pub(super) program: &'a Path,
    pub(super) node: &'a str,
    pub(super) node_ip: Ipv4Addr,
    /// `None` takes any free one.
    pub(super) port: Option<u16>,
    pub(super) kubeconfig: &'a Path,
    pub(super) socket: &'a Path,
    pub(super) cluster_dns: &'a [Ipv4Addr],
    pub(super) labels: &'a str,
    /// For its configuration and its log.
    pub(super) dir: &'a Path,
}

impl Kubelet<'_> {
    /// Starts it.
    pub(super) fn start(&self) -> Result<Process> {
        let config = self.write_config()?;
        let mut arguments = vec![
            format!("--config={}", config.display()),
            format!("--kubeconfig={}", self.kubeconfig.display()),
            "--root-dir=/var/lib/kubelet".to_owned(),
            format!("--hostname-override={}", self.node),
            format!("--node-ip={}", self.node_ip),
            "--v=2".to_owned(),
        ];
        if !self.labels.is_empty() {
            arguments.push(format!("--node-labels={}", self.labels));
        }
        Process::start(self.program, arguments, &[], &self.dir.join("kubelet.log"))
    }

    fn write_config(&self) -> Result<PathBuf> {
        let port = match self.port {
            Some(port) => port,
            None => free_port()?,
        };
        let config = json!({
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "containerRuntimeEndpoint": format!("unix://{}", self.socket.display()),
            // Two nodes share one network.
            "port": port,
            "healthzPort": 0,
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
            // This machine may have cgroup v1, and its cgroups are nobody's business here.
            "failCgroupV1": false,
            "cgroupDriver": "cgroupfs",
            "cgroupsPerQOS": false,
            "enforceNodeAllocatable": [],
            "failSwapOn": false,
            // Kubernetes 1.37 counts a pod's overhead twice once the pod runs: kubelet reports it within
            // status.allocatedResources (kubelet_pods.go), and the scheduler adds it to that
            // (component-helpers, resource/helpers.go). Few guests would fit on a small machine.
            "featureGates": {"InPlacePodLevelResourcesVerticalScaling": false},
            "makeIPTablesUtilChains": false,
            // Without it cAdvisor measures no file systems, and kubelet has no statistics of volumes either.
            "localStorageCapacityIsolation": true,
            // A full disk of the machine must not evict the pods of a test.
            "evictionHard": {
                "memory.available": "0%", "nodefs.available": "0%", "nodefs.inodesFree": "0%",
                "imagefs.available": "0%", "imagefs.inodesFree": "0%",
            },
            "imageGCHighThresholdPercent": 100,
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",
            "resolvConf": "",
            "clusterDomain": "cluster.local",
            "clusterDNS": self.cluster_dns,
            "maxPods": 250,
            // A guest boots within that, even when it waits for its turn.
            "runtimeRequestTimeout": "5m",
            // So that a test sees soon what takes minutes on a real node.
            "syncFrequency": "10s",
            "nodeStatusUpdateFrequency": "5s",
            "volumeStatsAggPeriod": "5s",
            "crashLoopBackOff": {"maxContainerRestartPeriod": "5s"},
            "serializeImagePulls": false,
        });
        let path = self.dir.join("kubelet.json");
        fs::write(&path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }
}

/// Nobody else listens in the test's network.
fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).context("find a free port")?;
    Ok(listener.local_addr()?.port())
}
