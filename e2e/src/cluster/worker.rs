//! A node: `zpod-e2e-node` with a kubelet, in a directory that holds everything a node has.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::inputs;
use crate::process::Process;

/// More guests than the two that share the processors well: a StatefulSet's replicas live at the same time.
const GUESTS: &str = "6";

/// A node, running or killed.
#[derive(Debug)]
pub(crate) struct Worker {
    name: String,
    number: usize,
    root: PathBuf,
    kubeconfig: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Worker {
    /// The node number `number` of a cluster, with pods in `10.88.<number>.0/24`.
    pub(crate) fn new(name: &str, number: usize, root: PathBuf, kubeconfig: PathBuf, log: PathBuf) -> Self {
        Self { name: name.to_owned(), number, root, kubeconfig, log, process: None }
    }

    pub(crate) fn start(&mut self, images: &Path) -> Result<()> {
        let show = |path: &Path| path.display().to_string();
        let arguments = [
            ["--name".to_owned(), self.name.clone()],
            ["--root".to_owned(), show(&self.root)],
            ["--kubelet".to_owned(), show(&inputs::kubernetes("kubelet")?)],
            ["--kubeconfig".to_owned(), show(&self.kubeconfig)],
            ["--images".to_owned(), show(images)],
            ["--pod-subnet".to_owned(), format!("10.88.{}.0/24", self.number)],
        ];
        // As the chart has it: a change of its default shows in all scenarios.
        let handlers = super::chart::runtime_handlers()?;
        let handlers = handlers.into_iter().map(|handler| format!("--runtime-handler={handler}"));
        let arguments = arguments.concat().into_iter().chain(handlers).collect::<Vec<_>>();
        let guests = std::env::var("ZPOD_E2E_GUESTS").unwrap_or_else(|_| GUESTS.to_owned());
        let environment = [("ZPOD_E2E_GUESTS", guests.as_str())];
        let process = Process::start(&inputs::node_program()?, arguments, &environment, &self.log)
            .with_context(|| format!("start node {}", self.name))?;
        self.process = Some(process);
        Ok(())
    }

    pub(crate) fn kill(&mut self) {
        self.process = None;
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    pub(crate) fn started(&self) -> bool {
        self.process.is_some()
    }

    pub(crate) fn must_run(&mut self) -> Result<()> {
        self.process.as_mut().map_or(Ok(()), Process::must_run).with_context(|| format!("node {}", self.name))
    }
}
