use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::Mark;

/// The longest name of a snapshot that ZFS itself takes (`ZFS_MAX_DATASET_NAME_LEN`).
const LONGEST: usize = 255;

/// A snapshot in the volume's pool that its next guest goes back to, before a container has the volume, and once: the guest
/// notes the id in the pool with what came of it. Guests of earlier versions know nothing of it, and refuse a spec that asks
/// for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Rollback {
    /// Made at random for each request.
    pub id: Uuid,
    /// What stands behind the @.
    pub snapshot: String,
    /// Its GUID, since one that is taken again under its name is another instant. 0 where it is not known.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub guid: u64,
    /// Snapshots that were taken later may be destroyed for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroy_newer: bool,
}

fn is_zero(guid: &u64) -> bool {
    *guid == 0
}

impl Rollback {
    /// What a name is made of.
    pub const CHARACTERS: &str = "A-Z, a-z, 0-9, _, ., : and -";

    /// Whether a snapshot of that name can be gone back to: ZFS takes it for one, it is neither a list nor a range of them,
    /// and not what the node marks an instant with.
    pub fn allows(snapshot: &str) -> bool {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte);
        let sound = (1..=LONGEST).contains(&snapshot.len()) && snapshot.bytes().all(plain);
        sound && snapshot.parse::<Mark>().is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SnapshotId;

    #[test]
    fn only_one_snapshot_that_is_its_owners_can_be_gone_back_to() {
        for name in ["a", "before_upgrade.1", "zpod-auto-hourly-20261130T120000Z", "12:00", &"a".repeat(LONGEST)] {
            assert!(Rollback::allows(name), "{name}");
        }
        let mark = Mark::for_snapshot(SnapshotId::from_name("s"));
        for name in ["", "a@b", "a%b", "a,b", "a b", "a/b", "é", mark.as_str(), &"a".repeat(LONGEST + 1)] {
            assert!(!Rollback::allows(name), "{name}");
        }
    }
}
