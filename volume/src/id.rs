use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::Excerpt;

/// So many bytes of its node's UID an inline volume's id begins with. The chart's admission policy compares the same: 13
/// characters, hyphen included.
const INLINE_PREFIX: usize = 6;

/// A typed id that follows from the name that CSI gives, so that two requests with one name can never make two things,
/// whoever handles them.
macro_rules! id_of_a_name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $domain:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// The id that belongs to a CSI name.
            pub fn from_name(name: &str) -> Self {
                let digest = Sha256::new().chain_update($domain).chain_update(name).finalize();
                let mut bytes = [0; 16];
                bytes.copy_from_slice(&digest[..16]);
                // RFC 9562 version 8: "custom", made by a rule of ours.
                Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
            }

            /// The id as a UUID.
            pub const fn uuid(self) -> Uuid {
                self.0
            }

            /// The id that a UUID stands for.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseNameError;

            /// Only the canonical form (lower case, hyphens) is an id: one thing has one name.
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let id = Uuid::try_parse(text).map(Self).ok().filter(|id| id.to_string() == text);
                id.ok_or_else(|| ParseNameError {
                    what: $what,
                    value: text.chars().take(64).collect(),
                    allowed: "a UUID in lower case with hyphens",
                })
            }
        }
    };
}

id_of_a_name! {
    /// The id of a volume: the CSI `volume_id`, the GPT disk GUID, and the name of its backing.
    VolumeId, "volume id", b"csi.zpod.storage/volume\0"
}

impl VolumeId {
    /// The id of a volume that a node makes for one pod: it follows from kubelet's handle and the UID of the node, and
    /// begins as that UID does, so that an API server can tell whether a node may take it.
    pub fn inline(handle: &str, node: Uuid) -> Self {
        let digest =
            Sha256::new().chain_update(b"csi.zpod.storage/inline-volume\0").chain_update(node).chain_update(handle);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest.finalize()[..16]);
        bytes[..INLINE_PREFIX].copy_from_slice(&node.as_bytes()[..INLINE_PREFIX]);
        Self(uuid::Builder::from_custom_bytes(bytes).into_uuid())
    }
}

id_of_a_name! {
    /// The id of a snapshot: the CSI `snapshot_id`, and the name of its backing.
    SnapshotId, "snapshot id", b"csi.zpod.storage/snapshot\0"
}

id_of_a_name! {
    /// The id of a group of snapshots that were taken together: the CSI `group_snapshot_id`.
    GroupId, "group snapshot id", b"csi.zpod.storage/group-snapshot\0"
}

/// A name that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not a {what}: {allowed}", Excerpt(value))]
pub struct ParseNameError {
    what: &'static str,
    value: String,
    allowed: &'static str,
}

/// The name of a ZFS snapshot that marks, inside a guest, the instant that a copy of its disk is to show: what stands
/// behind the `@`. The restored volume is rolled back to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mark(String);

/// What the name of every mark begins with. No other ZFS snapshot of ours does.
const MARK: &str = "zpod-mark-";

impl Mark {
    /// The mark for a snapshot.
    pub fn for_snapshot(id: SnapshotId) -> Self {
        Self(format!("{MARK}{}", id.uuid().simple()))
    }

    /// The mark for a clone, by the volume that the clone is.
    pub fn for_clone(id: VolumeId) -> Self {
        Self(format!("{MARK}{}", id.uuid().simple()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Mark {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hex = text.strip_prefix(MARK).unwrap_or_default();
        let good = hex.len() == 32 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        good.then(|| Self(text.to_owned())).ok_or_else(|| ParseNameError {
            what: "mark",
            value: text.chars().take(64).collect(),
            allowed: "zpod-mark- and 32 hexadecimal digits in lower case",
        })
    }
}

impl TryFrom<String> for Mark {
    type Error = ParseNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Mark> for String {
    fn from(mark: Mark) -> Self {
        mark.0
    }
}

/// The name of a pool inside a guest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PoolName(String);

impl PoolName {
    /// The pool of a volume: `zpod-` and the first twelve hexadecimal digits of its id.
    pub fn for_volume(id: VolumeId) -> Self {
        let hex = id.uuid().simple().to_string();
        Self(format!("zpod-{}", &hex[..12]))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for PoolName {
    type Err = ParseNameError;

    /// zpoolconcepts(7): a pool name begins with a letter and has letters, digits, `_`, `-`, `.`. Reserved beginnings
    /// (`mirror`, `raidz`, `draid`, `spare`, `log`) can't occur, since ours begin with `zpod-`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let rest = text.strip_prefix("zpod-").unwrap_or_default();
        let good = !rest.is_empty()
            && text.len() <= 64
            && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        good.then(|| Self(text.to_owned())).ok_or_else(|| ParseNameError {
            what: "pool name",
            value: text.chars().take(64).collect(),
            allowed: "zpod- and then lower-case letters, digits and hyphens, 64 characters at most",
        })
    }
}

impl TryFrom<String> for PoolName {
    type Error = ParseNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PoolName> for String {
    fn from(name: PoolName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inline_volumes_id_is_its_nodes_and_no_other_nodes() {
        let (handle, a, b) = ("csi-5e", Uuid::from_u128(1 << 100), Uuid::from_u128(2 << 100));
        let id = VolumeId::inline(handle, a);
        assert_eq!(id, VolumeId::inline(handle, a));
        assert_eq!(id.to_string()[..13], a.to_string()[..13]);
        assert_eq!(id.uuid().get_version_num(), 8);
        for other in [VolumeId::inline(handle, b), VolumeId::inline("csi-5f", a), VolumeId::from_name(handle)] {
            assert_ne!(id, other);
        }
    }

    #[test]
    fn one_name_has_one_id_and_it_never_changes() {
        let id = VolumeId::from_name("pvc-1");
        assert_eq!(id, VolumeId::from_name("pvc-1"));
        assert_ne!(id, VolumeId::from_name("pvc-2"));
        // Written down: a change here would orphan every volume there is.
        assert_eq!(id.to_string(), "3addcb02-4c3d-8797-93a0-17e4b2d2bb49");
    }

    #[test]
    fn an_id_has_one_spelling() {
        let id = VolumeId::from_name("x");
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in [id.to_string().to_uppercase(), id.uuid().simple().to_string(), "../x".into(), String::new()] {
            assert!(text.parse::<VolumeId>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_snapshot_is_no_volume_even_of_the_same_name() {
        assert_ne!(SnapshotId::from_name("x").uuid(), VolumeId::from_name("x").uuid());
        assert_ne!(SnapshotId::from_name("x").uuid(), GroupId::from_name("x").uuid());
    }

    #[test]
    fn a_mark_cannot_be_anything_but_a_mark() {
        let mark = Mark::for_snapshot(SnapshotId::from_name("x"));
        assert_eq!(mark.as_str().parse(), Ok(mark));
        for text in ["", "zpod-mark-", "x", "zpod-mark-0@x", "zpod-mark-../../../../../../../../../../.."] {
            assert!(text.parse::<Mark>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_pool_name_cannot_be_an_option_or_a_path() {
        assert!(PoolName::for_volume(VolumeId::from_name("x")).as_str().parse::<PoolName>().is_ok());
        for text in ["", "-f", "zpod-", "zpod-a/b", "zpod-a b", "tank", "zpod-A"] {
            assert!(text.parse::<PoolName>().is_err(), "{text}");
        }
    }
}
