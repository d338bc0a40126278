//! A container and what CRI says about it.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;

use super::pod::{Pod, selects};
use super::{api, filesystems};

/// How far a container is. Times are nanoseconds since 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum State {
    Created,
    Running { since: i64 },
    Exited { since: i64, at: i64, code: i32, reason: &'static str, message: String },
}

impl State {
    /// The end of a container that ran since then.
    pub(super) fn ended(since: i64, code: i32) -> Self {
        let reason = if code == 0 { "Completed" } else { "Error" };
        Self::Exited { since, at: filesystems::now(), code, reason, message: String::new() }
    }

    /// The end of a container that never ran: containerd's code and reason.
    pub(super) fn not_started(message: String) -> Self {
        let now = filesystems::now();
        Self::Exited { since: now, at: now, code: 128, reason: "StartError", message }
    }

    pub(super) fn has_ended(&self) -> bool {
        matches!(self, Self::Exited { .. })
    }
}

/// A container that was created and not removed yet.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) pod: Arc<Pod>,
    pub(super) config: api::ContainerConfig,
    pub(super) image_id: String,
    pub(super) log: PathBuf,
    pub(super) created_at: i64,
    pub(super) state: watch::Sender<State>,
}

impl Container {
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.pod.name(), self.config.metadata.clone().unwrap_or_default().name)
    }

    pub(super) fn runs(&self) -> bool {
        matches!(*self.state.borrow(), State::Running { .. })
    }

    fn cri_state(&self) -> api::ContainerState {
        match *self.state.borrow() {
            State::Created => api::ContainerState::ContainerCreated,
            State::Running { .. } => api::ContainerState::ContainerRunning,
            State::Exited { .. } => api::ContainerState::ContainerExited,
        }
    }

    pub(super) fn matches(&self, filter: &api::ContainerFilter) -> bool {
        (filter.id.is_empty() || filter.id == self.id)
            && (filter.pod_sandbox_id.is_empty() || filter.pod_sandbox_id == self.pod.id)
            && filter.state.as_ref().is_none_or(|wanted| wanted.state() == self.cri_state())
            && selects(&filter.label_selector, &self.config.labels)
    }

    fn image(&self) -> api::ImageSpec {
        let spec = self.config.image.clone().unwrap_or_default();
        // What the pod says: the other is what the image store said in between.
        let image = if spec.user_specified_image.is_empty() { spec.image } else { spec.user_specified_image };
        api::ImageSpec { image, ..Default::default() }
    }

    pub(super) fn item(&self) -> api::Container {
        api::Container {
            id: self.id.clone(),
            pod_sandbox_id: self.pod.id.clone(),
            metadata: self.config.metadata.clone(),
            image: Some(self.image()),
            image_ref: self.image_id.clone(),
            state: self.cri_state().into(),
            created_at: self.created_at,
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            image_id: self.image_id.clone(),
        }
    }

    pub(super) fn status(&self) -> api::ContainerStatus {
        let mut status = api::ContainerStatus {
            id: self.id.clone(),
            metadata: self.config.metadata.clone(),
            state: self.cri_state().into(),
            created_at: self.created_at,
            image: Some(self.image()),
            image_ref: self.image_id.clone(),
            image_id: self.image_id.clone(),
            labels: self.config.labels.clone(),
            annotations: self.config.annotations.clone(),
            mounts: self.config.mounts.clone(),
            log_path: self.log.display().to_string(),
            ..Default::default()
        };
        match self.state.borrow().clone() {
            State::Created => {}
            State::Running { since } => status.started_at = since,
            State::Exited { since, at, code, reason, message } => {
                (status.started_at, status.finished_at, status.exit_code) = (since, at, code);
                (status.reason, status.message) = (reason.to_owned(), message);
            }
        }
        status
    }
}
