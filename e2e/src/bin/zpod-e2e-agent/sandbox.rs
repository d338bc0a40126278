//! What the agent holds: the containers of the pod and the storages they use.

use std::collections::HashMap;
use std::fs;

use anyhow::{Result, anyhow};
use nix::unistd::sethostname;
use zpod_proto::agent::{CreateContainerRequest, CreateSandboxRequest};

use crate::container::{BASE, Container};
use crate::device;
use crate::storage::Storages;

#[derive(Debug, Default)]
pub(crate) struct Sandbox {
    containers: HashMap<String, Container>,
    storages: Storages,
}

impl Sandbox {
    pub(crate) async fn create(&mut self, request: CreateSandboxRequest) -> Result<()> {
        let _ = fs::remove_dir_all(BASE);
        fs::create_dir_all(BASE)?;
        // kata-agent gives it to a UTS namespace that all containers share: here that is the guest's.
        sethostname(&request.hostname)?;
        self.storages.add(request.storages).await.map(|_| ())
    }

    pub(crate) async fn create_container(&mut self, request: CreateContainerRequest) -> Result<()> {
        let id = request.container_id;
        // kata-sys-util `verify_id`: two characters or more.
        let mut bytes = id.bytes();
        let starts_well = id.len() > 1 && bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !starts_well || !bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
            return Err(anyhow!("invalid container ID {id}"));
        }
        let mut spec = request.oci.ok_or_else(|| anyhow!("no oci spec in the create container request!"))?;
        device::add(&request.devices, &mut spec).await?;
        let mounts = self.storages.add(request.storages).await?;
        match Container::create(&id, spec, mounts.clone()).await {
            Ok(container) => {
                self.containers.insert(id, container);
                Ok(())
            }
            Err(error) => {
                self.storages.remove(&mounts);
                Err(error)
            }
        }
    }

    pub(crate) fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| anyhow!("Invalid container id"))
    }

    pub(crate) async fn remove_container(&mut self, id: &str) -> Result<()> {
        self.container(id)?.destroy().await?;
        if let Some(container) = self.containers.remove(id) {
            self.storages.remove(&container.mounts);
        }
        Ok(())
    }

    pub(crate) async fn destroy(&mut self) -> Result<()> {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            self.remove_container(&id).await?;
        }
        Ok(())
    }
}
