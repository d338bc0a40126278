//! A pod and what CRI says about it.

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::api;
use super::machine::Machine;

/// A pod that was run and not removed yet.
#[derive(Debug)]
pub(super) struct Pod {
    pub(super) id: String,
    pub(super) config: api::PodSandboxConfig,
    pub(super) handler: String,
    pub(super) created_at: i64,
    /// None on the node's network.
    pub(super) address: Option<Ipv4Addr>,
    pub(super) machine: Arc<dyn Machine>,
    pub(super) stopped: AtomicBool,
}

/// What namespaces a pod asks for.
pub(super) fn namespaces(config: &api::PodSandboxConfig) -> api::NamespaceOption {
    let security = config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    security.and_then(|security| security.namespace_options.clone()).unwrap_or_default()
}

/// Whether labels have all that a selector asks for.
pub(super) fn selects(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector.iter().all(|(name, value)| labels.get(name) == Some(value))
}

impl Pod {
    /// `namespace/name`, for messages.
    pub(super) fn name(&self) -> String {
        let metadata = self.config.metadata.clone().unwrap_or_default();
        format!("{}/{}", metadata.namespace, metadata.name)
    }

    pub(super) fn state(&self) -> api::PodSandboxState {
        if !self.stopped.load(Ordering::Relaxed) && self.machine.runs() {
            api::PodSandboxState::SandboxReady
        } else {
            api::PodSandboxState::SandboxNotready
        }
    }

    pub(super) fn matches(&self, filter: &api::PodSandboxFilter) -> bool {
        (filter.id.is_empty() || filter.id == self.id)
            && filter.state.as_ref().is_none_or(|wanted| wanted.state() == self.state())
            && selects(&filter.label_selector, &self.config.labels)
    }

    pub(super) fn item(&self) -> api::PodSandbox {
        api::PodSandbox {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.state().into(),
            created_at: self.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            runtime_handler: self.handler.clone(),
        }
    }

    pub(super) fn status(&self) -> api::PodSandboxStatus {
        let ip = self.address.map(|address| address.to_string()).unwrap_or_default();
        let options = namespaces(&self.config);
        let item = self.item();
        api::PodSandboxStatus {
            id: item.id,
            metadata: item.metadata,
            state: item.state,
            created_at: item.created_at,
            network: Some(api::PodSandboxNetworkStatus { ip }),
            linux: Some(api::LinuxPodSandboxStatus { namespaces: Some(api::Namespace { options: Some(options) }) }),
            labels: item.labels,
            annotations: item.annotations,
            runtime_handler: item.runtime_handler,
        }
    }
}
