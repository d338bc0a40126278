use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::attributes::{SNAPSHOT_SCHEDULE, schedule};
use crate::{Bytes, Excerpt, Headroom, Property, PropertyKind, SnapshotSchedule};

/// Which provider makes the volume's block device on its node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// A sparse file in a directory of the node.
    #[default]
    File,
}

/// Whether a volume's space is taken at once or as it fills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Provisioning {
    /// Space is promised, and taken as the volume fills.
    #[default]
    Thin,
    /// Space is taken (`fallocate`) before the volume exists.
    Thick,
}

/// What the volume's capacity limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuotaMode {
    /// Files only; ZFS snapshots inside the guest use the room the partition leaves.
    #[default]
    Refquota,
    /// Files and snapshots together.
    Quota,
    /// Nothing: the partition alone is the bound.
    None,
}

/// How many devices of its node a volume's pool is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vdevs {
    /// One.
    #[default]
    #[serde(rename = "single")]
    Single,
    /// Two, each with all of the data, in two directories of the node.
    #[serde(rename = "mirror-2")]
    Mirror2,
}

impl Vdevs {
    /// Whether it is one device only.
    pub const fn is_single(&self) -> bool {
        matches!(self, Self::Single)
    }
}

/// What the containers of a volume's pod get of ZFS itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ZfsAccess {
    /// Nothing: a directory.
    #[default]
    None,
    /// Each container that mounts the volume gets `/dev/zfs`, the tools, and rights over the volume's dataset.
    Volume,
}

impl ZfsAccess {
    /// Whether they get nothing.
    pub const fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }
}

/// How a volume's contents are encrypted. ZFS's own encryption, in the guest: the host sees ciphertext.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encryption {
    /// AES with 256 bits in Galois/Counter mode.
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
}

impl Encryption {
    /// ZFS's word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Aes256Gcm => "aes-256-gcm",
        }
    }
}

/// How often a volume is scrubbed. Whole seconds, at least a minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ScrubInterval(u64);

impl ScrubInterval {
    const MIN: u64 = 60;

    /// As a duration.
    pub const fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }

    fn parse(text: &str) -> Option<Self> {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let unit = match unit {
            "m" => 60,
            "h" => 3600,
            "d" => 86400,
            "w" => 7 * 86400,
            _ => return None,
        };
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let seconds = digits.parse::<u64>().ok().filter(|_| plain)?.checked_mul(unit)?;
        (Self::MIN..=3650 * 86400).contains(&seconds).then_some(Self(seconds))
    }
}

/// A word of a fixed list.
pub(crate) trait Word: Sized + Copy + 'static {
    const WORDS: &'static [(&'static str, Self)];

    fn parse(key: &str, value: &str) -> Result<Self, ParameterError> {
        Self::WORDS.iter().find(|(word, _)| *word == value).map(|(_, parsed)| *parsed).ok_or_else(|| {
            let words: Vec<_> = Self::WORDS.iter().map(|(word, _)| *word).collect();
            ParameterError::bad(key, value, words.join(", "))
        })
    }
}

impl Word for Backing {
    const WORDS: &'static [(&'static str, Self)] = &[("file", Self::File)];
}

impl Word for Provisioning {
    const WORDS: &'static [(&'static str, Self)] = &[("thin", Self::Thin), ("thick", Self::Thick)];
}

impl Word for QuotaMode {
    const WORDS: &'static [(&'static str, Self)] =
        &[("refquota", Self::Refquota), ("quota", Self::Quota), ("none", Self::None)];
}

impl Word for Vdevs {
    const WORDS: &'static [(&'static str, Self)] = &[("single", Self::Single), ("mirror-2", Self::Mirror2)];
}

impl Word for ZfsAccess {
    const WORDS: &'static [(&'static str, Self)] = &[("none", Self::None), ("volume", Self::Volume)];
}

impl Word for bool {
    const WORDS: &'static [(&'static str, Self)] = &[("true", true), ("false", false)];
}

impl Word for Option<Encryption> {
    const WORDS: &'static [(&'static str, Self)] = &[("aes-256-gcm", Some(Encryption::Aes256Gcm)), ("off", None)];
}

/// What a StorageClass says about its volumes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeParameters {
    /// Provider of the block device.
    pub backing: Backing,
    /// Thin or thick.
    pub provisioning: Provisioning,
    /// How many devices its pool is made of.
    #[serde(default, skip_serializing_if = "Vdevs::is_single")]
    pub vdevs: Vdevs,
    /// How far the volume can grow while its pod runs.
    pub headroom: Headroom,
    /// What the capacity limits.
    pub quota: QuotaMode,
    /// Upper bound of the guest's ARC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arc_max: Option<Bytes>,
    /// Where the host's file system can't share blocks, snapshots and clones may be full copies.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_copy: bool,
    /// How the contents are encrypted; not at all where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// How often its guest scrubs it; never by itself where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub_interval: Option<ScrubInterval>,
    /// What the containers that mount it get of ZFS itself.
    #[serde(default, skip_serializing_if = "ZfsAccess::is_none")]
    pub zfs_access: ZfsAccess,
    /// The snapshots that its guest takes by itself; none where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_schedule: Option<SnapshotSchedule>,
    /// ZFS properties that differ from the defaults, by name. Always valid: see [`Property`].
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub properties: BTreeMap<String, String>,
}

/// A parameter that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// No such parameter.
    #[error("parameter {} is not known; allowed are: {}", Excerpt(key), VolumeParameters::keys().join(", "))]
    Unknown {
        /// The key as it was given.
        key: String,
    },
    /// No such mutable parameter.
    #[error("mutable parameter {} is not known; allowed are: {}", Excerpt(key), crate::VolumeAttributes::keys().join(", "))]
    UnknownMutable {
        /// The key as it was given.
        key: String,
    },
    /// Not one that a volume's life can change.
    #[error("mutable parameter {} can't be changed; what can: {}", Excerpt(key), crate::VolumeAttributes::keys().join(", "))]
    Immutable {
        /// The key as it was given.
        key: String,
    },
    /// A value that is not allowed.
    #[error("parameter {key}: {} is not allowed; allowed is: {allowed}", Excerpt(value))]
    Bad {
        /// The key.
        key: String,
        /// The value as it was given.
        value: String,
        /// What would be accepted.
        allowed: String,
    },
}

impl ParameterError {
    pub(crate) fn bad(key: &str, value: &str, allowed: impl Into<String>) -> Self {
        Self::Bad { key: key.to_owned(), value: value.to_owned(), allowed: allowed.into() }
    }
}

/// The prefix of what Kubernetes' sidecars add; not ours to judge.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";

impl VolumeParameters {
    /// The key of [`ZfsAccess`].
    pub const ZFS_ACCESS: &str = "zfsAccess";

    const OWN_KEYS: [&str; 11] = [
        "allowCopy",
        "arcMax",
        "backing",
        "encryption",
        "headroom",
        "provisioning",
        "quota",
        "scrubInterval",
        SNAPSHOT_SCHEDULE,
        "vdevs",
        Self::ZFS_ACCESS,
    ];

    /// Every key a StorageClass may use, sorted.
    pub fn keys() -> Vec<&'static str> {
        let mut keys: Vec<_> =
            Self::OWN_KEYS.into_iter().chain(Property::all().iter().map(|property| property.key)).collect();
        keys.sort_unstable();
        keys
    }

    /// Reads the parameters of a StorageClass. Keys of Kubernetes' sidecars are passed over.
    ///
    /// # Errors
    /// On the first key that is unknown or has a value that is not allowed.
    pub fn parse<'a>(map: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ParameterError> {
        let mut parameters = Self::default();
        let given: BTreeMap<_, _> = map.into_iter().filter(|(key, _)| !key.starts_with(SIDECAR_PREFIX)).collect();
        for (key, value) in given {
            match key {
                "allowCopy" => parameters.allow_copy = Word::parse(key, value)?,
                "encryption" => parameters.encryption = Word::parse(key, value)?,
                "scrubInterval" => {
                    let allowed = "a whole number with m, h, d or w behind it, at least 1m, such as 7d";
                    let interval = ScrubInterval::parse(value);
                    parameters.scrub_interval = Some(interval.ok_or_else(|| ParameterError::bad(key, value, allowed))?);
                }
                SNAPSHOT_SCHEDULE => parameters.snapshot_schedule = schedule(value)?,
                "backing" => parameters.backing = Word::parse(key, value)?,
                "provisioning" => parameters.provisioning = Word::parse(key, value)?,
                "vdevs" => parameters.vdevs = Word::parse(key, value)?,
                "quota" => parameters.quota = Word::parse(key, value)?,
                Self::ZFS_ACCESS => parameters.zfs_access = Word::parse(key, value)?,
                "headroom" => {
                    parameters.headroom = value
                        .parse()
                        .map_err(|e: crate::ParseHeadroomError| ParameterError::bad(key, value, e.to_string()))?;
                }
                "arcMax" => parameters.arc_max = Some(parse_arc_max(value)?),
                _ => {
                    let property =
                        Property::named(key).ok_or_else(|| ParameterError::Unknown { key: key.to_owned() })?;
                    if !property.allows(value) {
                        return Err(ParameterError::bad(key, value, property.allowed().to_string()));
                    }
                    parameters.properties.insert(key.to_owned(), value.to_owned());
                }
            }
        }
        Ok(parameters)
    }

    /// The properties of one kind, with the defaults of those that the class leaves out.
    pub fn properties_of(&self, kind: PropertyKind) -> BTreeMap<String, String> {
        let wanted = Property::all().iter().filter(|property| property.kind == kind);
        wanted
            .filter_map(|property| {
                let value = self.properties.get(property.key).map(String::as_str).or(property.default)?;
                Some((property.key.to_owned(), value.to_owned()))
            })
            .collect()
    }
}

/// OpenZFS refuses an `zfs_arc_max` below 64 MiB (zfs(4)).
const ARC_MAX_FLOOR: Bytes = Bytes::mib(64);

fn parse_arc_max(value: &str) -> Result<Bytes, ParameterError> {
    value.parse().ok().filter(|size| *size >= ARC_MAX_FLOOR).ok_or_else(|| {
        ParameterError::bad("arcMax", value, format!("a size of at least {ARC_MAX_FLOOR}, such as 256Mi"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<VolumeParameters, ParameterError> {
        VolumeParameters::parse(pairs.iter().copied())
    }

    #[test]
    fn nothing_given_means_the_defaults() {
        let parameters = parse(&[]).unwrap();
        assert_eq!(parameters, VolumeParameters::default());
        assert_eq!(parameters.properties_of(PropertyKind::PoolAtCreation)["ashift"], "12");
        assert_eq!(parameters.properties_of(PropertyKind::Dataset)["compression"], "lz4");
        assert!(!parameters.properties_of(PropertyKind::Dataset).contains_key("ashift"));
    }

    #[test]
    fn every_documented_key_is_taken() {
        let all = parse(&[
            ("backing", "file"),
            ("provisioning", "thick"),
            ("headroom", "2x"),
            ("quota", "none"),
            ("arcMax", "256Mi"),
            ("ashift", "13"),
            ("compression", "zstd-3"),
            ("recordsize", "16K"),
            ("atime", "on"),
            ("sync", "always"),
            ("logbias", "throughput"),
            ("primarycache", "metadata"),
            ("checksum", "sha256"),
            ("copies", "2"),
            ("xattr", "dir"),
            ("acltype", "off"),
            ("dedup", "on"),
            ("autotrim", "off"),
            ("volblocksize", "8K"),
            ("allowCopy", "true"),
            ("encryption", "aes-256-gcm"),
            ("scrubInterval", "7d"),
            ("vdevs", "mirror-2"),
            ("zfsAccess", "volume"),
            ("snapshotSchedule", "hourly=24 daily=7"),
            ("snapdir", "visible"),
            ("csi.storage.k8s.io/pvc/name", "data"),
        ])
        .unwrap();
        assert_eq!(all.properties.len(), 15);
        assert_eq!(all.snapshot_schedule.as_ref().unwrap().to_string(), "hourly=24 daily=7");
        assert_eq!(all.scrub_interval.unwrap().duration().as_secs(), 7 * 86400);
        assert_eq!((all.arc_max, all.vdevs), (Some(Bytes::mib(256)), Vdevs::Mirror2));
        assert_eq!(all.zfs_access, ZfsAccess::Volume);
        let before = serde_json::to_string(&VolumeParameters::default()).unwrap();
        assert!(!before.contains("vdevs"), "what is recorded of volumes with one device stays as it was");
        assert!(!before.contains("zfsAccess"), "and of those whose containers get nothing of ZFS");
        assert!(!before.contains("snapshotSchedule"), "and of those that take no snapshots by themselves");
        assert_eq!(all.properties_of(PropertyKind::Pool)["autotrim"], "off");
        let json = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<VolumeParameters>(&json).unwrap(), all);
    }

    #[test]
    fn what_is_refused_names_key_value_and_what_is_allowed() {
        for (key, value, want) in [
            ("compresion", "lz4", "\"compresion\" is not known; allowed are: acltype, allowCopy, arcMax"),
            ("backing", "nfs", "backing: \"nfs\" is not allowed; allowed is: file"),
            ("quota", "yes", "refquota, quota, none"),
            ("vdevs", "mirror", "single, mirror-2"),
            ("zfsAccess", "pool", "zfsAccess: \"pool\" is not allowed; allowed is: none, volume"),
            ("headroom", "0x", "1x (none) to 1000x"),
            ("arcMax", "1Mi", "at least 64 MiB"),
            ("recordsize", "3K", "a power of two from 512 to 16M"),
            ("compression", "zstd-99", "zstd-1 to zstd-19"),
            ("encryption", "on", "aes-256-gcm, off"),
            ("scrubInterval", "30s", "at least 1m"),
            ("scrubInterval", "-1d", "at least 1m"),
            ("allowCopy", "yes", "true, false"),
            ("volblocksize", "1M", "from 4K to 128K"),
            (
                "snapshotSchedule",
                "hourly=0",
                "snapshotSchedule: \"hourly=0\" is not allowed; allowed is: none, or each of",
            ),
            ("snapshotSchedule", "hourly=999 daily=2", "all together at most 1000"),
        ] {
            let error = parse(&[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
