use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The id of a volume: the CSI `volume_id`, the GPT disk GUID, and the name of its backing.
///
/// It follows from the name that CSI gives (`CreateVolume.name`), so that two requests with one name can never
/// make two volumes, whoever handles them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeId(Uuid);

impl VolumeId {
    /// The id that belongs to a CSI volume name.
    pub fn from_name(name: &str) -> Self {
        let digest = Sha256::new().chain_update(b"csi.zpod.storage/volume\0").chain_update(name).finalize();
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

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A name that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{value:?} is not a {what}: {allowed}")]
pub struct ParseNameError {
    what: &'static str,
    value: String,
    allowed: &'static str,
}

impl FromStr for VolumeId {
    type Err = ParseNameError;

    /// Only the canonical form (lower case, hyphens) is an id: one volume has one name.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let id = Uuid::try_parse(text).map(Self).ok().filter(|id| id.to_string() == text);
        id.ok_or_else(|| ParseNameError {
            what: "volume id",
            value: text.chars().take(64).collect(),
            allowed: "a UUID in lower case with hyphens",
        })
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
    fn a_pool_name_cannot_be_an_option_or_a_path() {
        assert!(PoolName::for_volume(VolumeId::from_name("x")).as_str().parse::<PoolName>().is_ok());
        for text in ["", "-f", "zpod-", "zpod-a/b", "zpod-a b", "tank", "zpod-A"] {
            assert!(text.parse::<PoolName>().is_err(), "{text}");
        }
    }
}
