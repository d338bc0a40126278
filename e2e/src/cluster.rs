//! A Kubernetes cluster for tests, of its real parts: etcd, kube-apiserver, kube-controller-manager, kube-scheduler,
//! and a real kubelet on each node.
//!
//! # Design
//! * [`isolate`] gives the process a network and a mount namespace of its own: the API server has port 443 of
//!   10.96.0.1, as pods expect, and nothing meets anything of the machine or of another run.
//! * [`Cluster::start`] starts the control plane, [`Cluster::add_node`] a node (`zpod-e2e-node`).
//! * Everybody has a certificate of his own, and RBAC and NodeRestriction hold as on any cluster.
//! * Nothing is pulled: `images` makes what the nodes run, under the names that the chart gives.
//!
//! # Limitations
//! No kube-proxy and no cluster DNS: of all Services only the API server's works. One network for all nodes.

mod authority;
pub mod chart;
mod claim;
mod control_plane;
pub mod images;
mod isolation;
mod kata;
mod kubectl;
mod shell;
mod snapshots;
mod worker;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio::time::Instant;

use crate::process::Process;
use crate::workdir::Workdir;
use crate::{PATIENCE, console, disk};
use authority::Authority;
pub use claim::Written;
use control_plane::ControlPlane;
pub use isolation::{BRIDGE_ADDRESS, SERVICE_ADDRESS, isolate};
pub use kata::DisksDisabled;
use kubectl::Kubectl;
use worker::Worker;

const KATA_LABEL: &str = "katacontainers.io/kata-runtime=true";
/// Where a node's disk for volumes is: a hundred of the smallest, twice.
const DISK: &str = "var/lib/zpod";
const DISK_SIZE: u64 = 64 << 30;
/// So many lines of each log in a diagnosis.
const TAIL: usize = 15;
/// So many lines of each answer in a diagnosis.
const MOST: usize = 80;

/// A running cluster. It ends, with everything it started, when it is dropped or the thread that made it ends.
#[derive(Debug)]
pub struct Cluster {
    kubectl: Kubectl,
    kubeconfig: PathBuf,
    workers: Mutex<Vec<Worker>>,
    // Programs beside the nodes: the snapshot-controller.
    beside: Mutex<Vec<Process>>,
    plane: Mutex<ControlPlane>,
    authority: Authority,
    // The last to go: it takes the directories of all others along.
    workdir: Workdir,
}

impl Cluster {
    /// Starts a control plane without nodes. The process must be [isolated](isolate).
    ///
    /// # Errors
    /// When a part is missing or doesn't get ready.
    pub async fn start() -> Result<Self> {
        let workdir = Workdir::new()?;
        let authority = Authority::new(&workdir.subdirectory("pki")?)?;
        let kubeconfig = authority.kubeconfig("admin.conf", "admin", Some("system:masters"))?;
        let kubectl = Kubectl::new(&kubeconfig, &workdir.subdirectory("home")?);
        let plane = ControlPlane::start(&workdir, &authority, &kubectl).await;
        let plane = plane.with_context(|| diagnose_logs(workdir.path()))?;
        images::write(&workdir.subdirectory("images")?)?;
        Ok(Self {
            kubectl,
            kubeconfig,
            workers: Mutex::default(),
            beside: Mutex::default(),
            plane: Mutex::new(plane),
            authority,
            workdir,
        })
    }

    /// Adds a node and waits until it is Ready; nothing when it is there. A node that was [killed](Cluster::kill_node)
    /// starts again on its old directories.
    ///
    /// # Errors
    /// When it doesn't get ready.
    pub async fn add_node(&self, name: &str) -> Result<()> {
        let mut workers = self.workers.lock().await;
        let place = match workers.iter().position(|worker| worker.name() == name) {
            Some(place) => place,
            None => {
                let place = workers.len();
                workers.push(self.new_worker(name, place + 1)?);
                place
            }
        };
        let worker = &mut workers[place];
        if worker.started() {
            return worker.must_run();
        }
        worker.start(&self.workdir.path().join("images"))?;
        let what = format!("node {name} Ready");
        let ready = kubectl::poll(Instant::now() + PATIENCE, &what, async || {
            worker.must_run()?;
            Ok(self.node_is_ready(name).await)
        });
        ready.await.with_context(|| format!("the node's log ends:\n{}", console::tail(worker.log(), TAIL)))?;
        // As kata-deploy does when it is done.
        self.kubectl(&["label", "--overwrite", "node", name, KATA_LABEL]).await?;
        Ok(())
    }

    fn new_worker(&self, name: &str, number: usize) -> Result<Worker> {
        let root = self.node_dir(name);
        std::fs::create_dir_all(&root).with_context(|| format!("create {}", root.display()))?;
        kata::deploy(&root)?;
        // Somebody may have given the node another.
        if !root.join(DISK).exists() {
            disk::mount_xfs(&root.join(DISK), DISK_SIZE)?;
        }
        let user = format!("system:node:{name}");
        let kubeconfig = self.authority.kubeconfig(&format!("{name}.conf"), &user, Some("system:nodes"))?;
        let log = self.workdir.path().join("logs").join(format!("{name}.log"));
        Ok(Worker::new(name, number, root, kubeconfig, log))
    }

    async fn node_is_ready(&self, name: &str) -> Result<()> {
        let node = self.kubectl_json(&["get", "node", name]).await?;
        let conditions = node["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.iter().find(|condition| condition["type"] == "Ready");
        match ready {
            Some(condition) if condition["status"] == "True" => Ok(()),
            other => kubectl::not_yet(&other),
        }
    }

    /// Kills a node with its kubelet and its pods, as a power cut does. Its directories stay.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn kill_node(&self, name: &str) -> Result<()> {
        let mut workers = self.workers.lock().await;
        let Some(worker) = workers.iter_mut().find(|worker| worker.name() == name) else {
            bail!("there is no node {name}");
        };
        worker.kill();
        Ok(())
    }

    /// Kills a node and takes it out of the cluster, with the pods that were on it: their collector would need a while.
    ///
    /// # Errors
    /// When there is no such node.
    pub async fn remove_node(&self, name: &str) -> Result<()> {
        self.kill_node(name).await?;
        self.kubectl(&["delete", "node", name]).await?;
        let on_it = format!("spec.nodeName={name}");
        self.kubectl(&["delete", "pods", "-A", "--field-selector", &on_it, "--force", "--grace-period=0"]).await?;
        Ok(())
    }

    /// The directory that is a node's root: `var/lib/zpod`, `run/kata` and the like are below it.
    pub fn node_dir(&self, name: &str) -> PathBuf {
        // Short: unix sockets below it have 108 bytes.
        self.workdir.path().join("n").join(name)
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// Where everything of this cluster is: `logs`, `images`, `pki`.
    pub fn dir(&self) -> &Path {
        self.workdir.path()
    }

    /// What kubectl prints.
    ///
    /// # Errors
    /// When it fails, with what it complains about.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl.run(arguments).await
    }

    /// What kubectl prints with `-o json`.
    ///
    /// # Errors
    /// As [`Cluster::kubectl`].
    pub async fn kubectl_json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl.run(&[arguments, &["-o", "json"]].concat()).await?;
        serde_json::from_str(&text).with_context(|| format!("kubectl {} printed no JSON", arguments.join(" ")))
    }

    /// Applies manifests.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub async fn apply(&self, yaml: &str) -> Result<String> {
        self.kubectl.run_program("kubectl", &["apply", "-f", "-"], Some(yaml)).await
    }

    /// Applies manifests as large ones have to be: on the server's side.
    ///
    /// # Errors
    /// When the API server refuses one.
    pub async fn apply_on_server(&self, yaml: &str) -> Result<String> {
        self.kubectl.run_program("kubectl", &["apply", "--server-side", "-f", "-"], Some(yaml)).await
    }

    /// Puts an object in the place of one of its name, whatever can't be changed in it.
    ///
    /// # Errors
    /// When the API server refuses it.
    pub async fn replace(&self, object: &Value) -> Result<String> {
        let text = object.to_string();
        self.kubectl.run_program("kubectl", &["replace", "--force", "-f", "-"], Some(&text)).await
    }

    /// Deletes what manifests name and waits until it is gone; nothing when it is.
    ///
    /// # Errors
    /// When it stays.
    pub async fn delete(&self, yaml: &str) -> Result<String> {
        let arguments = ["delete", "--ignore-not-found", "--wait", "-f", "-"];
        self.kubectl.run_program("kubectl", &arguments, Some(yaml)).await
    }

    /// What Helm 4 prints.
    ///
    /// # Errors
    /// When it fails, with what it complains about.
    pub async fn helm(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl.run_program("helm", arguments, None).await
    }

    /// What Helm 3 prints.
    ///
    /// # Errors
    /// When it fails, with what it complains about.
    pub async fn helm3(&self, arguments: &[&str]) -> Result<String> {
        self.kubectl.run_program("helm3", arguments, None).await
    }

    /// Asks until there is an answer. `check` says `Ok` when it has it, and an error that tells what there is instead:
    /// the last one is what the failure shows.
    ///
    /// # Errors
    /// When there is none within [`PATIENCE`].
    pub async fn wait<T>(&self, what: &str, mut check: impl AsyncFnMut() -> Result<T>) -> Result<T> {
        kubectl::poll(Instant::now() + PATIENCE, what, async || Ok(check().await)).await
    }

    /// Waits until a pod is in a phase, `Running` or `Succeeded`. A Running one is also Ready.
    ///
    /// # Errors
    /// When it isn't in time; with the pod's status and events.
    pub async fn wait_for_pod(&self, namespace: &str, name: &str, phase: &str) -> Result<Value> {
        let what = format!("pod {namespace}/{name} {phase}");
        let result = self.wait(&what, async || {
            let pod = self.kubectl_json(&["get", "pod", name, "-n", namespace]).await?;
            let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let ready = conditions.iter().any(|each| each["type"] == "Ready" && each["status"] == "True");
            if pod["status"]["phase"] == phase && (ready || phase != "Running") {
                return Ok(pod);
            }
            kubectl::not_yet(&pod["status"].to_string())
        });
        match result.await {
            Ok(pod) => Ok(pod),
            Err(error) => Err(error.context(self.events_of(namespace, name).await)),
        }
    }

    /// The events about an object, or why there are none.
    pub async fn events_of(&self, namespace: &str, name: &str) -> String {
        let selector = format!("involvedObject.name={name}");
        let arguments =
            ["get", "events", "-n", namespace, "--field-selector", &selector, "--sort-by", ".lastTimestamp"];
        self.kubectl(&arguments).await.unwrap_or_else(|error| format!("no events: {error:#}"))
    }

    /// Kills the API server.
    pub async fn stop_api_server(&self) {
        self.plane.lock().await.stop_api_server();
    }

    /// Starts the API server again, on the data that is there, and waits until it is ready.
    ///
    /// # Errors
    /// When it doesn't get ready.
    pub async fn start_api_server(&self) -> Result<()> {
        self.plane.lock().await.start_api_server(&self.authority, &self.kubectl).await
    }

    /// What a person would look at first when something went wrong.
    pub async fn diagnosis(&self) -> String {
        let logs = ["logs", "-n", chart::NAMESPACE, "-l", "app.kubernetes.io/part-of=zpod"];
        let logs = [&logs[..], &["--all-containers", "--prefix", "--tail=15", "--max-log-requests=50"]].concat();
        let questions: [&[&str]; 5] = [
            &["get", "nodes,pods", "-A", "-o", "wide"],
            &["get", "pvc,pv", "-A"],
            &["get", "zfsvolumes,zfsnodes", "-o", "wide"],
            &["get", "events", "-A", "--field-selector", "type=Warning", "--sort-by", ".lastTimestamp"],
            &logs,
        ];
        let mut text = String::new();
        for question in questions {
            let answer = self.kubectl(question).await.unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<_> = answer.lines().collect();
            // The newest, where a test has made a hundred of something.
            let newest = lines[lines.len().saturating_sub(MOST)..].join("\n");
            text.push_str(&format!("--- kubectl {}\n{newest}\n", question.join(" ")));
        }
        text + &diagnose_logs(self.workdir.path())
    }
}

/// The ends of all logs: the control plane's, the nodes', and the kubelets' from their directories.
fn diagnose_logs(dir: &Path) -> String {
    let list = |path: PathBuf| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let kubelets = list(dir.join("n")).map(|node| node.join("kubelet.log"));
    let mut logs: Vec<_> = list(dir.join("logs")).chain(kubelets).collect();
    logs.sort();
    logs.iter().map(|log| format!("--- {} ends:\n{}\n", log.display(), console::tail(log, TAIL))).collect()
}
