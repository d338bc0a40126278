//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use tokio::time::Instant;

use super::authority::Authority;
use super::isolation::BRIDGE_ADDRESS;
use super::kubectl::{Kubectl, poll};
use crate::inputs;
use crate::process::Process;
use crate::workdir::Workdir;

const ETCD: &str = "http://127.0.0.1:2379";
const SERVICES: &str = "10.96.0.0/16";

/// The running parts. The API server can be killed and started again.
#[derive(Debug)]
pub(crate) struct ControlPlane {
    logs: PathBuf,
    etcd: Process,
    api_server: Option<Process>,
    // Only kept running.
    controllers: Option<(Process, Process)>,
}

impl ControlPlane {
    /// Starts all of it and waits until a pod can be made.
    pub(crate) async fn start(workdir: &Workdir, authority: &Authority, kubectl: &Kubectl) -> Result<Self> {
        let logs = workdir.subdirectory("logs")?;
        let etcd = start_etcd(&workdir.subdirectory("etcd")?, &logs)?;
        let mut plane = Self { logs, etcd, api_server: None, controllers: None };
        plane.start_api_server(authority, kubectl).await?;
        plane.controllers = Some((plane.start_controller_manager(authority)?, plane.start_scheduler(authority)?));
        // kube-controller-manager makes it; pods are refused without.
        let account = ["get", "serviceaccount", "default"];
        plane.until("the default service account", async || kubectl.run(&account).await.map(drop)).await?;
        Ok(plane)
    }

    /// Starts the API server, on the data that is there.
    pub(crate) async fn start_api_server(&mut self, authority: &Authority, kubectl: &Kubectl) -> Result<()> {
        let flag = |name: &str, file: &str| format!("--{name}={}", authority.file(file));
        let arguments = [
            format!("--etcd-servers={ETCD}"),
            "--bind-address=0.0.0.0".to_owned(),
            "--secure-port=443".to_owned(),
            format!("--advertise-address={BRIDGE_ADDRESS}"),
            format!("--service-cluster-ip-range={SERVICES}"),
            flag("tls-cert-file", "server.crt"),
            flag("tls-private-key-file", "server.key"),
            flag("client-ca-file", "ca.crt"),
            "--authorization-mode=Node,RBAC".to_owned(),
            "--enable-admission-plugins=NodeRestriction".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            flag("service-account-key-file", "accounts.pub"),
            flag("service-account-signing-key-file", "accounts.key"),
            // The node plugin's pods are privileged.
            "--allow-privileged=true".to_owned(),
            // No name server knows the nodes.
            "--kubelet-preferred-address-types=InternalIP".to_owned(),
        ];
        self.api_server = Some(self.process("kube-apiserver", arguments)?);
        let ready = ["get", "--raw", "/readyz"];
        self.until("/readyz of kube-apiserver", async || kubectl.run(&ready).await.map(drop)).await
    }

    /// Kills the API server; etcd and everything else goes on.
    pub(crate) fn stop_api_server(&mut self) {
        self.api_server = None;
    }

    fn start_controller_manager(&self, authority: &Authority) -> Result<Process> {
        let user = "system:kube-controller-manager";
        let kubeconfig = authority.kubeconfig("kube-controller-manager.conf", user, None)?;
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            format!("--root-ca-file={}", authority.file("ca.crt")),
            format!("--service-account-private-key-file={}", authority.file("accounts.key")),
            // Each controller with its own rights, as on a real cluster.
            "--use-service-account-credentials=true".to_owned(),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
            // Of its own accord it sends 20 requests in a second, which is four claims.
            "--kube-api-qps=10000".to_owned(),
            "--kube-api-burst=10000".to_owned(),
        ];
        self.process("kube-controller-manager", arguments)
    }

    fn start_scheduler(&self, authority: &Authority) -> Result<Process> {
        let kubeconfig = authority.kubeconfig("kube-scheduler.conf", "system:kube-scheduler", None)?;
        let arguments = [
            format!("--kubeconfig={}", kubeconfig.display()),
            "--leader-elect=false".to_owned(),
            "--bind-address=127.0.0.1".to_owned(),
        ];
        self.process("kube-scheduler", arguments)
    }

    fn process(&self, name: &str, arguments: impl IntoIterator<Item = String>) -> Result<Process> {
        Process::start(&inputs::kubernetes(name)?, arguments, &[], &self.logs.join(format!("{name}.log")))
    }

    /// Waits until something succeeds, or any part has ended.
    async fn until(&mut self, what: &str, mut check: impl AsyncFnMut() -> Result<()>) -> Result<()> {
        poll(Instant::now() + crate::PATIENCE, what, async || {
            self.must_run()?;
            Ok(check().await)
        })
        .await
    }

    fn must_run(&mut self) -> Result<()> {
        self.etcd.must_run()?;
        if let Some(api_server) = &mut self.api_server {
            api_server.must_run()?;
        }
        if let Some((manager, scheduler)) = &mut self.controllers {
            manager.must_run()?;
            scheduler.must_run()?;
        }
        Ok(())
    }
}

/// etcd, in memory: this cluster's data has no tomorrow.
fn start_etcd(dir: &Path, logs: &Path) -> Result<Process> {
    mount(Some("etcd"), dir, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("mount a tmpfs for etcd")?;
    let peers = "http://127.0.0.1:2380";
    let arguments = [
        format!("--data-dir={}", dir.join("data").display()),
        format!("--listen-client-urls={ETCD}"),
        format!("--advertise-client-urls={ETCD}"),
        format!("--listen-peer-urls={peers}"),
        format!("--initial-advertise-peer-urls={peers}"),
        format!("--initial-cluster=default={peers}"),
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
    ];
    Process::start(&inputs::kubernetes("etcd")?, arguments, &[], &logs.join("etcd.log"))
}
