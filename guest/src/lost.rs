//! What has become of a pool that can't be imported, as far as its label says.
//!
//! # Design
//! Who has ZFS in a container with CAP_SYS_ADMIN can do to a pool what an administrator can. ZFS then says of its import
//! that there is no such pool. The label says more: whether the pool was destroyed, what it is called now, whether it lies on
//! other devices too.

use std::fmt;

use crate::machine::Label;

/// What a label says of a pool that can't be imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// Nothing that explains it.
    Nothing,
    /// There is no label where a pool has its first one.
    NoLabel,
    /// It was destroyed.
    Destroyed {
        /// What it is called.
        name: String,
    },
    /// It has another name.
    Other {
        /// That name.
        name: String,
        /// Its GUID.
        guid: u64,
    },
    /// It lies on other devices too.
    Devices {
        /// How many there are.
        count: u64,
    },
}

impl Seen {
    /// What a label says of a pool that may have one of these names.
    pub fn of(label: Option<&Label>, names: &[&str]) -> Self {
        let Some(label) = label else { return Self::NoLabel };
        let name = label.name.clone();
        if label.destroyed {
            return Self::Destroyed { name };
        }
        if !names.contains(&name.as_str()) {
            return Self::Other { name, guid: label.guid };
        }
        if label.devices > 1 { Self::Devices { count: label.devices } } else { Self::Nothing }
    }

    /// What can be done.
    pub const fn remedy(&self) -> &'static str {
        match self {
            Self::Nothing => "restore the volume from a snapshot or a backup if it stays so",
            Self::NoLabel => "restore the volume from a snapshot or a backup",
            Self::Destroyed { .. } => {
                "what was in it may still be there: who operates the node can bring it back with zpool import -D \
                 (docs/pod-zfs.md); if not, restore the volume from a snapshot or a backup"
            }
            Self::Other { .. } => {
                "if it was renamed, who operates the node can give it its name back with zpool import \
                 (docs/pod-zfs.md); if not, restore the volume from a snapshot or a backup"
            }
            Self::Devices { .. } => {
                "what was written to the others is not here: restore the volume from a snapshot or a backup"
            }
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => Ok(()),
            Self::NoLabel => {
                f.write_str(": there is no label of it: somebody has wiped it (zpool labelclear) or overwritten it")
            }
            Self::Destroyed { name } => {
                write!(f, ": somebody has destroyed it (zpool destroy; its label says pool {name}, DESTROYED)")
            }
            Self::Other { name, guid } => write!(
                f,
                ": on the disk is pool {name} (GUID {guid}): somebody has renamed the volume's pool (zpool import OLD NEW), \
                 split it (zpool split), or made another one in its place"
            ),
            Self::Devices { count } => write!(
                f,
                ": somebody has made it lie on {count} devices (zpool add), of which this disk is one, and the volume has no other"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_says_what_has_become_of_its_pool() {
        let label = Label { guid: 42, txg: 7, name: "zpod-a".into(), devices: 1, ..Label::default() };
        let of = |label: Label| Seen::of(Some(&label), &["zpod-b", "zpod-a"]);
        for (seen, want) in [
            (of(label.clone()), Seen::Nothing),
            (of(Label { exported: true, ..label.clone() }), Seen::Nothing),
            (of(Label { destroyed: true, ..label.clone() }), Seen::Destroyed { name: "zpod-a".into() }),
            (of(Label { name: "mine".into(), ..label.clone() }), Seen::Other { name: "mine".into(), guid: 42 }),
            (of(Label { devices: 2, ..label }), Seen::Devices { count: 2 }),
            (Seen::of(None, &["zpod-a"]), Seen::NoLabel),
        ] {
            assert_eq!(seen, want);
            assert!(want == Seen::Nothing || want.to_string().contains("somebody has"), "{want}");
            assert!(want.remedy().contains("from a snapshot or a backup"), "{want}");
        }
    }
}
