//! Datasets that a tenant has made below its volume's.
//!
//! # Design
//! Who may use ZFS in its containers makes datasets below the volume's, and finds them in every later container as it left
//! them: each is mounted below the volume's mount point of that container, at the place that its name says, before the
//! container is made. `canmount` is the tenant's way to say which are not (`noauto`, `off`); its `mountpoint` is a path of
//! nobody knows which container, and is not looked at.
//!
//! A child that can't be mounted is told of, and keeps nobody from the volume.
//!
//! Most volumes have none: that is known from a property that is read in any case (`usedbychildren`), and then no command is
//! run, unless containers can make some in between.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use super::activate::Activation;
use super::{Volume, Volumes, Wanted};
use crate::machine::{Child, Fault, Machine, MountFlags, Properties};

/// So many are mounted: each holds memory of the guest's kernel, and takes a part of the time that a container has.
const MOST: usize = 256;
/// Of the time that a container has, this is for them.
const PATIENCE: Duration = Duration::from_secs(10);
/// So many that are not mounted are named.
const NAMED: usize = 3;

impl<M: Machine> Activation<'_, M> {
    /// Notes whether there are any.
    pub(super) fn note_children(&self, now: &Properties) {
        let used = now.get("usedbychildren").and_then(|used| used.parse::<u64>().ok());
        self.volume.state().children = used.is_some_and(|used| used > 0);
    }
}

impl<M: Machine> Volumes<M> {
    /// Mounts them for a container whose volume is mounted; the gate is held. What can't be mounted is noted.
    pub(super) async fn mount_children(&self, volume: &Volume, wanted: &Wanted) {
        if wanted.spec.zfs_access.is_none() && !volume.state().children {
            return;
        }
        let dataset = wanted.spec.dataset();
        let trouble = match self.machine.children(&dataset).await {
            Ok(children) => self.mount_each(&dataset, &children, wanted).await,
            Err(fault) => Some(format!("the datasets below {dataset} are not mounted: {fault}")),
        };
        if let Some(trouble) = &trouble {
            tracing::warn!(volume = %volume.id, "{trouble}");
        }
        volume.state().trouble = trouble;
    }

    async fn mount_each(&self, dataset: &str, children: &[Child], wanted: &Wanted) -> Option<String> {
        let (mut mounted, mut failed, begun) = (0, Vec::new(), Instant::now());
        // What is in them may come from a stream of anybody's.
        let flags = MountFlags { nosuid: true, nodev: true, ..wanted.flags };
        for child in children.iter().filter(|child| child.mountable) {
            let done = match place(dataset, &child.dataset) {
                _ if mounted == MOST => Err(Fault::new(format!("{MOST} others are mounted, and no more are"))),
                _ if begun.elapsed() >= PATIENCE => {
                    Err(Fault::new(format!("there was no time for it: others took {} s", PATIENCE.as_secs())))
                }
                None => Err(Fault::new("its name is no path")),
                Some(place) => self.machine.mount_child(&child.dataset, &wanted.mount_point, &place, flags).await,
            };
            match done {
                Ok(_) => mounted += 1,
                Err(fault) => failed.push(format!("{}: {fault}", child.dataset)),
            }
        }
        let (named, count) = (failed.iter().take(NAMED).cloned().collect::<Vec<_>>().join("; "), failed.len());
        (count > 0).then(|| {
            format!(
                "{count} of the datasets below {dataset} can't be mounted in its containers, which have the volume all the \
                 same: {named}"
            )
        })
    }
}

/// Where below the volume a child goes.
fn place(dataset: &str, child: &str) -> Option<PathBuf> {
    let place = Path::new(child.strip_prefix(dataset)?.strip_prefix('/')?);
    let sound = place.components().all(|part| matches!(part, Component::Normal(_))) && !place.as_os_str().is_empty();
    sound.then(|| place.to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::tests::{disks, guest, prepare, wanted};
    use super::*;
    use crate::machine::simulated::SimMachine;
    use std::sync::Arc;
    use zpod_volume::{Create, ZfsAccess};

    fn child(name: &str, mountable: bool) -> Child {
        Child { dataset: name.to_owned(), mountable }
    }

    #[test]
    fn a_child_goes_where_its_name_says_and_nowhere_else() {
        assert_eq!(place("p/data", "p/data/a/b"), Some("a/b".into()));
        for other in ["p/data", "p/data/", "p/other/a", "p/data2/a", "p/data//etc", "p/data/../x", "p/data/./x"] {
            let found = place("p/data", other);
            assert!(found.is_none() || found == Some("x".into()), "{other}: {found:?}");
        }
    }

    fn mounted(volumes: &Arc<Volumes<SimMachine>>) -> Vec<String> {
        let mounts = volumes.machine().mounts();
        mounts.into_iter().map(|(at, ..)| at.display().to_string()).filter(|at| at.starts_with("/m")).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn children_are_mounted_for_each_container_and_one_that_can_not_be_is_told_of() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let mut volume = wanted("a", Create::Fresh, "/m1");
        volume.spec.zfs_access = ZfsAccess::Volume;
        let dataset = volume.spec.dataset();
        let below = |name: &str| format!("{dataset}/{name}");
        let _ = prepare(&volumes, "c1", volume.clone()).await.unwrap();
        assert_eq!(mounted(&volumes), ["/m1"]);
        // Made by the first container; the second one of the same pod has them.
        let all = [child(&below("a"), true), child(&below("a/b"), true), child(&below("off"), false)];
        volumes.machine().has_children(&all);
        let second = Wanted { mount_point: "/m2".into(), ..volume.clone() };
        let _ = prepare(&volumes, "c2", second).await.unwrap();
        assert_eq!(mounted(&volumes), ["/m1", "/m2", "/m2/a", "/m2/a/b"]);
        assert_eq!(volumes.status(Duration::ZERO).await[0].trouble, None);
        volumes.release_all().await;
        assert!(mounted(&volumes).is_empty());
        assert!(volumes.machine().imported().is_empty());

        // One that is broken, such as one with a key of its own.
        volumes.machine().has_children(&[child(&below("a"), true), child(&below("broken"), true)]);
        let _ = prepare(&volumes, "c3", volume).await.unwrap();
        assert_eq!(mounted(&volumes), ["/m1", "/m1/a"]);
        let now = volumes.status(Duration::ZERO).await.remove(0);
        let trouble = now.trouble.clone().unwrap();
        assert!(trouble.contains("1 of the datasets") && trouble.contains("data/broken"), "{trouble}");
        assert_eq!(now.problem().as_deref(), Some(trouble.as_str()));
        assert_eq!(now.refusal, None, "the container has its volume");
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_whose_time_is_up_while_they_are_mounted_leaves_nothing_of_its_volume() {
        let disks = disks(&["a", "b"]);
        let volumes = guest(&disks);
        let two = ["a", "b"].map(|name| wanted(name, Create::Fresh, &format!("/m-{name}")));
        let mut first = two[0].clone();
        first.spec.zfs_access = ZfsAccess::Volume;
        volumes.machine().has_children(&[child(&format!("{}/x", first.spec.dataset()), true)]);
        *volumes.machine().child_time.lock().unwrap() = Duration::from_secs(9);
        let all = [two[1].clone(), first.clone()];
        let error = volumes.prepare("c1", &all, Instant::now() + Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, crate::error::VolumeError::Overrun { .. }), "{error}");
        assert!(mounted(&volumes).is_empty(), "{:?}", mounted(&volumes));
        assert!(volumes.status(Duration::ZERO).await.iter().all(|volume| volume.containers.is_empty()));
        // The same of a container that has it already is not taken from it.
        *volumes.machine().child_time.lock().unwrap() = Duration::ZERO;
        let _ = prepare(&volumes, "c1", first.clone()).await.unwrap();
        *volumes.machine().child_time.lock().unwrap() = Duration::from_secs(9);
        let _ = volumes.prepare("c1", &[first], Instant::now() + Duration::from_secs(5)).await;
        assert_eq!(mounted(&volumes), ["/m-a", "/m-a/x"]);
    }

    #[tokio::test(start_paused = true)]
    async fn no_command_is_run_for_a_volume_that_can_have_none() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let volume = wanted("a", Create::Fresh, "/m1");
        let _ = prepare(&volumes, "c1", volume.clone()).await.unwrap();
        volumes.release_all().await;
        // It was made from one that had some.
        let used = ("usedbychildren".to_owned(), "98304".to_owned());
        let asked = |volumes: &Arc<Volumes<SimMachine>>| {
            volumes.machine().steps().iter().filter(|step| *step == "list children").count()
        };
        assert_eq!(asked(&volumes), 0);
        let _ = prepare(&volumes, "c2", volume.clone()).await.unwrap();
        volumes.machine().set_dataset(&volume.spec.dataset(), &[used]).await.unwrap();
        volumes.release_all().await;
        let _ = prepare(&volumes, "c3", volume).await.unwrap();
        assert_eq!(asked(&volumes), 1);
    }
}
