//! A container's mounts: what CRI asks for, checked against this node's mounts.

use std::path::{Component, Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::cri::api;

/// How mounts below a mount travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Propagation {
    Private,
    HostToContainer,
    Bidirectional,
}

/// A bind mount from the node into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mount {
    pub(super) source: PathBuf,
    pub(super) target: PathBuf,
    pub(super) read_only: bool,
    pub(super) propagation: Propagation,
}

/// The mounts of a container, outer ones before those inside them.
///
/// # Errors
/// Where containerd refuses too: a relative target, a mount of an image, propagation that the source doesn't have.
pub(super) fn plan(mounts: &[api::Mount], mountinfo: &str) -> Result<Vec<Mount>> {
    let mut planned = Vec::new();
    for mount in mounts {
        let (source, target) = (PathBuf::from(&mount.host_path), PathBuf::from(&mount.container_path));
        if mount.image.as_ref().is_some_and(|image| !image.image.is_empty()) {
            bail!("{}: image volumes are not supported", target.display());
        }
        if !target.is_absolute() || target.components().any(|part| part == Component::ParentDir) {
            bail!("{} is no place for a mount", target.display());
        }
        let (propagation, needs): (_, &[&str]) = match mount.propagation() {
            api::MountPropagation::PropagationPrivate => (Propagation::Private, &[]),
            api::MountPropagation::PropagationHostToContainer => {
                (Propagation::HostToContainer, &["shared:", "master:"])
            }
            api::MountPropagation::PropagationBidirectional => (Propagation::Bidirectional, &["shared:"]),
        };
        if let Some((point, fields)) = mount_of(mountinfo, &source)
            && !needs.is_empty()
            && !needs.iter().any(|need| fields.contains(need))
        {
            bail!("path {:?} is mounted on {point:?} but it is not a shared mount", mount.host_path);
        }
        planned.push(Mount { source, target, read_only: mount.readonly, propagation });
    }
    planned.sort_by_key(|mount| mount.target.components().count());
    Ok(planned)
}

/// The mount that a path lies on: its mount point, and its line with the optional fields.
fn mount_of<'a>(mountinfo: &'a str, path: &Path) -> Option<(&'a str, &'a str)> {
    let points = mountinfo.lines().filter_map(|line| Some((line.split(' ').nth(4)?, line)));
    // Of equally long ones the last: it lies on top.
    points.filter(|(point, _)| path.starts_with(point)).max_by_key(|(point, _)| point.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTINFO: &str = "22 1 254:0 / / rw,relatime - ext4 /dev/root rw\n\
        40 22 254:0 /n/var/lib/kubelet /var/lib/kubelet rw,relatime shared:7 - ext4 /dev/root rw\n\
        41 22 254:0 /n/run/kata /run/kata rw,relatime master:3 - ext4 /dev/root rw\n";

    fn mount(source: &str, target: &str, propagation: api::MountPropagation) -> api::Mount {
        let propagation = propagation.into();
        api::Mount { host_path: source.into(), container_path: target.into(), propagation, ..Default::default() }
    }

    #[test]
    fn outer_mounts_come_first_and_keep_the_order_of_the_pod() {
        use api::MountPropagation::PropagationPrivate as Private;
        let asked = [mount("/a", "/x/y/z", Private), mount("/b", "/x", Private), mount("/c", "/w", Private)];
        let targets: Vec<_> = plan(&asked, MOUNTINFO).unwrap().into_iter().map(|mount| mount.target).collect();
        assert_eq!(targets, [Path::new("/x"), Path::new("/w"), Path::new("/x/y/z")]);
    }

    #[test]
    fn propagation_that_the_node_does_not_have_is_refused_as_containerd_does() {
        use api::MountPropagation::{PropagationBidirectional as Both, PropagationHostToContainer as Down};
        for (source, propagation, good) in [
            ("/var/lib/kubelet/pods", Both, true),
            ("/var/lib/kubelet", Down, true),
            ("/run/kata", Down, true),
            ("/run/kata", Both, false),
            ("/srv", Down, false),
            ("/var/lib/kubelets", Both, false),
        ] {
            let result = plan(&[mount(source, "/t", propagation)], MOUNTINFO);
            assert_eq!(result.is_ok(), good, "{source} {propagation:?}");
        }
        let error = plan(&[mount("/srv", "/t", Both)], MOUNTINFO).unwrap_err().to_string();
        assert_eq!(error, "path \"/srv\" is mounted on \"/\" but it is not a shared mount");
    }

    #[test]
    fn a_target_that_leaves_the_container_is_refused() {
        for target in ["data", "/../data", ""] {
            let asked = mount("/a", target, api::MountPropagation::PropagationPrivate);
            assert!(plan(&[asked], MOUNTINFO).is_err(), "{target:?}");
        }
    }
}
