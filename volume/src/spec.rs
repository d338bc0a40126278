use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{
    Bytes, DiskLayout, Encryption, Mark, Mirror, PoolName, Property, PropertyKind, QuotaMode, Rollback,
    SnapshotSchedule, VolumeId, VolumeParameters, ZfsAccess,
};

/// What the option begins with that carries a [`VolumeSpec`].
pub const OPTION_PREFIX: &str = "zpod=";

/// The longest encoded spec that is looked at.
const MAX_ENCODED: usize = 16 << 10;

/// A mount flag that a volume may carry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MountFlag {
    /// No programs are run from the volume.
    Noexec,
    /// Set-user-id and set-group-id bits are ignored.
    Nosuid,
    /// Device nodes are ignored.
    Nodev,
    /// Access times are not kept.
    Noatime,
}

/// What the node tells the guest about one volume, version 1. No secrets: Kata keeps it in a file on the host.
///
/// It travels as a mount option, `zpod=` and the base64url of its JSON, through the direct-volume file, the shim and
/// the agent's request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VolumeSpec {
    /// Version of this structure: 1.
    pub v: Version,
    /// The volume, and the GUID of its disk.
    pub id: VolumeId,
    /// Made at random for each publication and told to that pod's guest only. The guest repeats it on the control
    /// channel: that is how the node knows that a guest speaks of a volume of its own and not of another tenant's.
    pub token: Uuid,
    /// Its pool.
    pub pool: PoolName,
    /// Whether the guest may make the pool (DESIGN: create once).
    pub create: Create,
    /// What the volume holds: the quota.
    pub capacity: Bytes,
    /// The partition's size.
    pub partition: Bytes,
    /// What the capacity limits.
    pub quota: QuotaMode,
    /// Mount it read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Properties given when the pool is made.
    #[serde(default)]
    pub pool_creation_properties: BTreeMap<String, String>,
    /// Properties of the pool, set at every start.
    #[serde(default)]
    pub pool_properties: BTreeMap<String, String>,
    /// Properties of the dataset, set at every start.
    #[serde(default)]
    pub dataset_properties: BTreeMap<String, String>,
    /// Upper bound of the guest's ARC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arc_max: Option<Bytes>,
    /// The group that owns the volume's root, with set-group-id, and may write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_group: Option<u32>,
    /// Mount flags.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_flags: Vec<MountFlag>,
    /// A file system, or a block device.
    #[serde(default, skip_serializing_if = "VolumeMode::is_filesystem")]
    pub mode: VolumeMode,
    /// Properties given when the block device is made.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub volume_creation_properties: BTreeMap<String, String>,
    /// Space of the pool that is kept for the volume's own files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<Bytes>,
    /// How the contents are encrypted. The key comes over the control channel and is never here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// Whose contents the disk was copied from, until a guest has made them this volume's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// The disk is two halves, and the pool a mirror of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
    /// What the containers that mount it get of ZFS itself. Guests of earlier versions know nothing of it, and refuse a
    /// spec that asks for it.
    #[serde(default, skip_serializing_if = "ZfsAccess::is_none")]
    pub zfs_access: ZfsAccess,
    /// The snapshots that the guest takes by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_schedule: Option<SnapshotSchedule>,
    /// What the guest does once, before a container has the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Rollback>,
}

/// What a container gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeMode {
    /// A directory.
    #[default]
    Filesystem,
    /// A block device: a zvol of the pool.
    Block,
}

impl VolumeMode {
    /// Whether it is a directory.
    pub const fn is_filesystem(&self) -> bool {
        matches!(self, Self::Filesystem)
    }
}

/// Where a disk's contents come from: a copy of the disk of another volume, as a guest last left it or as it was while
/// one ran.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Origin {
    /// The volume whose pool and journal are on the disk. Not the one that was copied, where that was itself a copy
    /// that no guest has made its own yet.
    pub volume: VolumeId,
    /// The instant to roll back to, where a guest ran while the copy was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
    /// Whether a guest had reported the pool when the copy was made. If not, there may be none on the disk.
    pub initialized: bool,
    /// Made at random for the copy where the ids are the same: a volume that was deleted, and made again under its name
    /// from a snapshot of itself. The guest notes it in the journal with the end of its work; without, the journal that
    /// was copied along would say that it was done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<Uuid>,
}

impl Origin {
    /// The same for a new copy that becomes a volume of this id.
    #[must_use]
    pub fn of_new_copy(self, id: VolumeId) -> Self {
        // The id tells all others apart. Guests of earlier versions know those only.
        let copy = (self.volume == id).then(Uuid::new_v4);
        Self { copy, ..self }
    }
}

/// Whether a guest may make a pool. The guest's own journal on the disk has the last word: no pool is made where the
/// journal says that one was finished, or where labels are without a journal that says one was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Create {
    /// A new volume: nothing was ever written where its pool goes, and no guest has reported one.
    Fresh,
    /// Something was written, but no guest has ever reported the pool: a creation that the journal says was begun and
    /// not finished may be finished. No container has seen such a volume.
    Resume,
    /// A guest has reported the pool: it is there, or something is wrong.
    Never,
}

/// The one version there is. Another number does not parse.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Version;

impl TryFrom<u32> for Version {
    type Error = String;

    fn try_from(number: u32) -> Result<Self, Self::Error> {
        match number {
            1 => Ok(Self),
            _ => Err(format!(
                "VolumeSpec version {number} is not known here; the guest image must match the node plugin"
            )),
        }
    }
}

impl From<Version> for u32 {
    fn from(_: Version) -> Self {
        1
    }
}

/// A `zpod=` option that does not parse.
#[derive(Debug, thiserror::Error)]
pub enum DecodeSpecError {
    /// Far longer than any spec.
    #[error("the zpod= option is {0} characters long, at most {MAX_ENCODED} are allowed")]
    TooLong(usize),
    /// Not base64url.
    #[error("the zpod= option is not base64url: {0}")]
    Base64(#[from] base64::DecodeError),
    /// Not the JSON of a spec.
    #[error("the zpod= option is not a VolumeSpec: {0}")]
    Json(#[from] serde_json::Error),
    /// A property that must not be set, or not to that value.
    #[error("the zpod= option sets {0}={1}, which is not allowed")]
    Property(String, String),
    /// Sizes that no volume has.
    #[error("the zpod= option gives a capacity of {0} and a partition of {1}, which don't belong together")]
    Size(Bytes, Bytes),
    /// A mirror that no node plugin makes.
    #[error("the zpod= option gives a mirror that is {0}, which no volume is")]
    Mirror(&'static str),
    /// A name that no snapshot of an owner has.
    #[error("the zpod= option goes back to snapshot {0:?}, which is not the name of one")]
    Rollback(String),
}

impl VolumeSpec {
    /// A volume of `capacity` whose properties are left to ZFS, writable by root, with its capacity bounding its files.
    pub fn new(id: VolumeId, token: Uuid, create: Create, capacity: Bytes) -> Self {
        Self {
            v: Version,
            id,
            token,
            pool: PoolName::for_volume(id),
            create,
            capacity,
            partition: DiskLayout::partition_for(capacity),
            quota: QuotaMode::default(),
            read_only: false,
            pool_creation_properties: BTreeMap::new(),
            pool_properties: BTreeMap::new(),
            dataset_properties: BTreeMap::new(),
            arc_max: None,
            fs_group: None,
            mount_flags: Vec::new(),
            mode: VolumeMode::Filesystem,
            volume_creation_properties: BTreeMap::new(),
            reservation: None,
            encryption: None,
            origin: None,
            mirror: None,
            zfs_access: ZfsAccess::None,
            snapshot_schedule: None,
            rollback: None,
        }
    }

    /// The dataset that is mounted, or whose block device is handed out.
    pub fn dataset(&self) -> String {
        format!("{}/data", self.pool)
    }

    /// The mount option that carries this spec.
    pub fn to_option(&self) -> String {
        format!("{OPTION_PREFIX}{}", URL_SAFE_NO_PAD.encode(self.to_json()))
    }

    pub(crate) fn to_json(&self) -> Vec<u8> {
        // A struct of strings, numbers and maps with string keys always has a JSON form.
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Reads the option's value: what stands behind `zpod=`.
    ///
    /// # Errors
    /// When it is not a spec of this version, or one that could not have come from a node plugin.
    pub fn decode(value: &str) -> Result<Self, DecodeSpecError> {
        if value.len() > MAX_ENCODED {
            return Err(DecodeSpecError::TooLong(value.len()));
        }
        Self::from_json(&URL_SAFE_NO_PAD.decode(value)?)
    }

    pub(crate) fn from_json(json: &[u8]) -> Result<Self, DecodeSpecError> {
        let spec: Self = serde_json::from_slice(json)?;
        spec.check()?;
        Ok(spec)
    }

    fn check(&self) -> Result<(), DecodeSpecError> {
        let kinds = [
            (PropertyKind::PoolAtCreation, &self.pool_creation_properties),
            (PropertyKind::Pool, &self.pool_properties),
            (PropertyKind::Dataset, &self.dataset_properties),
            (PropertyKind::VolumeAtCreation, &self.volume_creation_properties),
        ];
        if !self.zfs_access.is_none() && !self.mode.is_filesystem() {
            let (key, value) = (VolumeParameters::ZFS_ACCESS.to_owned(), "volume".to_owned());
            return Err(DecodeSpecError::Property(key, value));
        }
        for (kind, properties) in kinds {
            for (key, value) in properties {
                let fits = |known: &&Property| known.kind == kind && (known.block || self.mode.is_filesystem());
                let known = Property::named(key).filter(fits).is_some_and(|known| known.allows(value));
                if !known {
                    return Err(DecodeSpecError::Property(key.clone(), value.clone()));
                }
            }
        }
        match self.mirror {
            Some(_) if !self.mode.is_filesystem() => return Err(DecodeSpecError::Mirror("a block device")),
            Some(_) if self.origin.is_some() => return Err(DecodeSpecError::Mirror("a copy of another volume's disk")),
            _ => {}
        }
        if let Some(rollback) = self.rollback.as_ref().filter(|rollback| !Rollback::allows(&rollback.snapshot)) {
            return Err(DecodeSpecError::Rollback(rollback.snapshot.chars().take(64).collect()));
        }
        let sound = self.capacity >= DiskLayout::MIN_CAPACITY
            && self.capacity <= DiskLayout::MAX_CAPACITY
            && self.partition == DiskLayout::partition_for(self.capacity);
        if sound { Ok(()) } else { Err(DecodeSpecError::Size(self.capacity, self.partition)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Half;
    use proptest::prelude::*;

    fn spec() -> VolumeSpec {
        let id = VolumeId::from_name("pvc-1");
        VolumeSpec {
            pool_creation_properties: [("ashift".into(), "12".into())].into(),
            dataset_properties: [("compression".into(), "lz4".into())].into(),
            fs_group: Some(2000),
            mount_flags: vec![MountFlag::Nosuid],
            snapshot_schedule: Some("hourly=24 daily=7".parse().unwrap()),
            rollback: Some(Rollback {
                id: Uuid::from_u128(3),
                snapshot: "before".into(),
                guid: 0,
                destroy_newer: true,
            }),
            ..VolumeSpec::new(id, Uuid::from_u128(7), Create::Fresh, Bytes::gib(1))
        }
    }

    fn encode(json: &str) -> String {
        URL_SAFE_NO_PAD.encode(json)
    }

    #[test]
    fn a_spec_survives_the_journey() {
        let option = spec().to_option();
        let value = option.strip_prefix(OPTION_PREFIX).unwrap();
        assert!(!value.contains([',', '=', ' ', '/']), "must be a single mount option: {value}");
        assert_eq!(VolumeSpec::decode(value).unwrap(), spec());
    }

    #[test]
    fn what_no_node_plugin_writes_is_refused() {
        let json = serde_json::to_string(&spec()).unwrap();
        for (from, to, want) in [
            ("\"v\":1", "\"v\":2", "version 2"),
            ("\"create\":\"fresh\",", "", "missing field"),
            ("\"create\":\"fresh\"", "\"create\":\"fresh\",\"more\":1", "unknown field"),
            ("\"create\":\"fresh\"", "\"create\":\"always\"", "unknown variant"),
            ("\"compression\":\"lz4\"", "\"mountpoint\":\"/\"", "mountpoint=/"),
            ("\"compression\":\"lz4\"", "\"compression\":\"lz4 -f\"", "not allowed"),
            ("hourly=24 daily=7", "hourly=24 -r", "none, or each of"),
            ("hourly=24 daily=7", "none", "none, or each of"),
            ("\"before\"", "\"before,after\"", "goes back to"),
            ("\"destroyNewer\":true", "\"destroyNewer\":true,\"clones\":true", "unknown field"),
            ("zpod-3addcb024c3d", "-f", "not a pool name"),
            ("1073741824", "1024", "don't belong together"),
            ("\"create\":\"fresh\"", "\"create\":\"fresh\",\"mirror\":{\"behind\":\"third\"}", "unknown variant"),
        ] {
            assert!(json.contains(from), "{from} in {json}");
            let error = VolumeSpec::decode(&encode(&json.replacen(from, to, 1))).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(matches!(VolumeSpec::decode(&"A".repeat(MAX_ENCODED + 1)), Err(DecodeSpecError::TooLong(_))));
    }

    #[test]
    fn access_to_zfs_survives_the_journey_and_is_of_file_systems_only() {
        let asked = VolumeSpec { zfs_access: ZfsAccess::Volume, ..spec() };
        let option = asked.to_option();
        assert_eq!(VolumeSpec::decode(option.strip_prefix(OPTION_PREFIX).unwrap()).unwrap(), asked);
        let without = String::from_utf8(spec().to_json()).unwrap();
        assert!(!without.contains("zfsAccess"), "guests of earlier versions refuse what they don't know: {without}");
        let block = VolumeSpec { mode: VolumeMode::Block, dataset_properties: BTreeMap::new(), ..asked };
        let error = VolumeSpec::from_json(&block.to_json()).unwrap_err().to_string();
        assert!(error.contains("zfsAccess=volume"), "{error}");
    }

    #[test]
    fn a_mirror_survives_the_journey_and_is_no_block_device_and_no_copy() {
        for behind in [None, Some(Half::First), Some(Half::Second)] {
            let mirrored = VolumeSpec { mirror: Some(Mirror { behind }), ..spec() };
            let option = mirrored.to_option();
            assert_eq!(VolumeSpec::decode(option.strip_prefix(OPTION_PREFIX).unwrap()).unwrap(), mirrored);
        }
        let mirror = Some(Mirror::default());
        let origin = Some(Origin { volume: VolumeId::from_name("b"), mark: None, initialized: true, copy: None });
        let block = VolumeSpec { mode: VolumeMode::Block, dataset_properties: BTreeMap::new(), mirror, ..spec() };
        for wrong in [VolumeSpec { origin, mirror, ..spec() }, block] {
            assert!(matches!(VolumeSpec::from_json(&wrong.to_json()), Err(DecodeSpecError::Mirror(_))));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(text in ".{0,200}", json in any::<Vec<u8>>()) {
            let _ = VolumeSpec::decode(&text);
            let _ = VolumeSpec::decode(&URL_SAFE_NO_PAD.encode(json));
        }
    }
}
