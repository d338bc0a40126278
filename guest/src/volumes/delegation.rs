//! Rights over a volume's dataset for those in its containers (zfs-allow(8)).
//!
//! # Design
//! To ZFS, root in a container without CAP_SYS_ADMIN is a user like any other: what it may do with a dataset has to be
//! given to it. So where the volume's class says `zfsAccess: volume`, its guest gives user 0 and the volume's fsGroup a set
//! of rights over the dataset and all below it, and notes to whom, in a property of the pool's own
//! dataset: over that one nobody in a container has rights without CAP_SYS_ADMIN, so it can't be forged by whom it is about.
//! It is read as a number of a group and nothing else.
//!
//! What a tenant has given to others is left alone.

use super::activate::Activation;
use crate::machine::{DELEGATED, Fault, Grantee, Machine};

/// Changes with [`crate::machine::Machine::allow`]'s set of rights, which is then given anew.
const VERSION: &str = "1";
pub(super) const NOBODY: &str = "none";

/// Who has rights by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delegates {
    Nobody,
    /// Root, and this group.
    Root(Option<u32>),
}

impl Delegates {
    /// Reads the note. One of another version, or that is none, says nothing: then all is given.
    fn noted(note: &str) -> Self {
        match note.split(' ').collect::<Vec<_>>()[..] {
            [VERSION, "root"] => Self::Root(None),
            [VERSION, "root", group] => group.parse().map_or(Self::Nobody, |group| Self::Root(Some(group))),
            _ => Self::Nobody,
        }
    }

    fn note(self) -> String {
        match self {
            Self::Nobody => NOBODY.to_owned(),
            Self::Root(None) => format!("{VERSION} root"),
            Self::Root(Some(group)) => format!("{VERSION} root {group}"),
        }
    }

    const fn group(self) -> Option<u32> {
        match self {
            Self::Nobody => None,
            Self::Root(group) => group,
        }
    }
}

impl<M: Machine> Activation<'_, M> {
    /// Gives the rights that the spec asks for, and takes away those that it does not ask for any more. Not worth a pod that
    /// does not start.
    pub(super) async fn delegate(&self) {
        let spec = &self.request.spec;
        if !spec.mode.is_filesystem() {
            return;
        }
        let before = match self.machine.noted(&spec.pool, DELEGATED).await {
            Ok(note) => Delegates::noted(&note),
            Err(fault) => {
                tracing::warn!(volume = %self.id, "who has rights over its dataset is not known: {fault}");
                Delegates::Nobody
            }
        };
        let wanted = if spec.zfs_access.is_none() { Delegates::Nobody } else { Delegates::Root(self.request.fs_group) };
        if before == wanted {
            return;
        }
        self.progress.stage("giving its containers rights over it (zfsAccess)");
        if let Err(fault) = self.delegate_now(before, wanted).await {
            tracing::warn!(volume = %self.id, "rights over its dataset are not as its class says (zfsAccess): {fault}");
        }
    }

    async fn delegate_now(&self, before: Delegates, wanted: Delegates) -> Result<(), Fault> {
        let dataset = self.request.spec.dataset();
        let allow = |grantee, allowed| self.machine.allow(&dataset, grantee, allowed);
        if let Some(group) = before.group().filter(|group| wanted.group() != Some(*group)) {
            allow(Grantee::Group(group), false).await?;
        }
        match wanted {
            Delegates::Nobody => allow(Grantee::Root, false).await?,
            Delegates::Root(group) => {
                allow(Grantee::Root, true).await?;
                if let Some(group) = group {
                    allow(Grantee::Group(group), true).await?;
                }
            }
        }
        self.machine.note(&self.request.spec.pool, DELEGATED, &wanted.note()).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::Wanted;
    use super::super::tests::{disks, guest, prepare, wanted};
    use super::*;
    use zpod_volume::{Create, ZfsAccess};

    #[test]
    fn what_is_noted_is_read_again_and_nothing_else_is_taken_for_it() {
        for delegates in [Delegates::Nobody, Delegates::Root(None), Delegates::Root(Some(2000))] {
            assert_eq!(Delegates::noted(&delegates.note()), delegates);
        }
        for other in ["-", "", "2 root", "1 root x", "1 root 1 2", "1 root -1", "1 root\n", "1  root"] {
            assert_eq!(Delegates::noted(other), Delegates::Nobody, "{other:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn rights_are_given_as_the_class_says_once_and_taken_away_again() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let volume = |access, group| {
            let mut volume = wanted("a", Create::Fresh, "/m1");
            (volume.spec.zfs_access, volume.fs_group) = (access, group);
            volume
        };
        let mut seen = 0;
        let mut steps = async |volume: Wanted| {
            let _ = prepare(&volumes, "c1", volume).await.unwrap();
            volumes.release_all().await;
            let all = volumes.machine().steps();
            let new: Vec<_> = all[seen..].iter().filter(|step| step.contains("allow")).cloned().collect();
            seen = all.len();
            new
        };
        let none = ZfsAccess::None;
        let some = ZfsAccess::Volume;
        assert!(steps(volume(none, Some(5))).await.is_empty());
        assert_eq!(steps(volume(some, None)).await, ["allow Root"]);
        assert!(steps(volume(some, None)).await.is_empty(), "no command where nothing changes");
        assert_eq!(steps(volume(some, Some(5))).await, ["allow Root", "allow Group(5)"]);
        assert_eq!(steps(volume(some, Some(6))).await, ["unallow Group(5)", "allow Root", "allow Group(6)"]);
        assert_eq!(steps(volume(none, Some(6))).await, ["unallow Group(6)", "unallow Root"]);
        assert!(steps(volume(none, Some(6))).await.is_empty());
    }
}
