use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::parameters::Word as _;
use crate::{Bytes, ParameterError, Property, PropertyKind, QuotaMode, SnapshotSchedule, VolumeParameters};

/// What a VolumeAttributesClass says: what of a volume can change while it lives. It overrides the StorageClass.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VolumeAttributes(BTreeMap<String, String>);

/// The key of the capacity's meaning.
const QUOTA: &str = "quota";
/// The key of the space that is kept for the volume's own files.
const RESERVATION: &str = "reservation";
/// The key of the automatic snapshots.
pub(crate) const SNAPSHOT_SCHEDULE: &str = "snapshotSchedule";

impl VolumeAttributes {
    /// Every key a VolumeAttributesClass may use, sorted.
    pub fn keys() -> Vec<&'static str> {
        let properties = Property::all().iter().filter(|property| property.mutable).map(|property| property.key);
        let mut keys: Vec<_> = [QUOTA, RESERVATION, SNAPSHOT_SCHEDULE].into_iter().chain(properties).collect();
        keys.sort_unstable();
        keys
    }

    /// Reads the mutable parameters of a request.
    ///
    /// # Errors
    /// On the first key that is unknown or can't change, or has a value that is not allowed.
    pub fn parse<'a>(map: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Self, ParameterError> {
        let given: BTreeMap<_, _> = map.into_iter().collect();
        for (key, value) in &given {
            match *key {
                QUOTA => drop(QuotaMode::parse(key, value)?),
                RESERVATION => drop(reservation(value)?),
                SNAPSHOT_SCHEDULE => drop(schedule(value)?),
                _ => {
                    let property = Property::named(key).filter(|property| property.mutable);
                    let property = property.ok_or_else(|| refused(key))?;
                    if !property.allows(value) {
                        return Err(ParameterError::bad(key, value, property.allowed().to_string()));
                    }
                }
            }
        }
        Ok(Self(given.into_iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect()))
    }

    /// These with changes on top of them: what the changes don't name stays.
    #[must_use]
    pub fn with(&self, changes: &Self) -> Self {
        let mut all = self.0.clone();
        all.extend(changes.0.clone());
        Self(all)
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is said, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// What the capacity limits.
    pub fn quota(&self, parameters: &VolumeParameters) -> QuotaMode {
        self.0.get(QUOTA).and_then(|value| QuotaMode::parse(QUOTA, value).ok()).unwrap_or(parameters.quota)
    }

    /// The space that is kept for the volume's own files, at most its capacity. None where nothing is kept.
    pub fn reservation(&self, capacity: Bytes) -> Option<Bytes> {
        let wanted = self.0.get(RESERVATION).and_then(|value| reservation(value).ok())??;
        Some(wanted.min(capacity))
    }

    /// The snapshots that its guest takes by itself; `None` where it takes none.
    pub fn snapshot_schedule(&self, parameters: &VolumeParameters) -> Option<SnapshotSchedule> {
        match self.0.get(SNAPSHOT_SCHEDULE).map(|value| SnapshotSchedule::parse(value)) {
            Some(Ok(schedule)) => schedule,
            _ => parameters.snapshot_schedule.clone(),
        }
    }

    /// The properties of one kind: those of the class with these on top.
    pub fn properties_of(&self, parameters: &VolumeParameters, kind: PropertyKind) -> BTreeMap<String, String> {
        let mut properties = parameters.properties_of(kind);
        let ours = self.0.iter().filter(|(key, _)| Property::named(key).is_some_and(|known| known.kind == kind));
        properties.extend(ours.map(|(key, value)| (key.clone(), value.clone())));
        properties
    }
}

/// The error for a key that is none of a volume's attributes.
fn refused(key: &str) -> ParameterError {
    let key = key.to_owned();
    if VolumeParameters::keys().contains(&key.as_str()) {
        ParameterError::Immutable { key }
    } else {
        ParameterError::UnknownMutable { key }
    }
}

pub(crate) fn schedule(value: &str) -> Result<Option<SnapshotSchedule>, ParameterError> {
    SnapshotSchedule::parse(value).map_err(|allowed| ParameterError::bad(SNAPSHOT_SCHEDULE, value, allowed.to_string()))
}

fn reservation(value: &str) -> Result<Option<Bytes>, ParameterError> {
    let allowed = || ParameterError::bad(RESERVATION, value, "none, or a size such as 10Gi");
    if value == "none" { Ok(None) } else { value.parse().map(Some).map_err(|_| allowed()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(pairs: &[(&str, &str)]) -> Result<VolumeAttributes, ParameterError> {
        VolumeAttributes::parse(pairs.iter().copied())
    }

    #[test]
    fn what_changes_lies_on_top_of_the_class() {
        let class = VolumeParameters::parse([("compression", "zstd"), ("atime", "on"), ("quota", "none")]).unwrap();
        let first = parse(&[("compression", "lz4"), ("quota", "quota"), ("reservation", "8Gi")]).unwrap();
        let both = first.with(&parse(&[("compression", "off"), ("autotrim", "off")]).unwrap());
        let dataset = both.properties_of(&class, PropertyKind::Dataset);
        assert_eq!((dataset["compression"].as_str(), dataset["atime"].as_str()), ("off", "on"));
        assert_eq!(both.properties_of(&class, PropertyKind::Pool)["autotrim"], "off");
        assert_eq!(both.quota(&class), QuotaMode::Quota);
        assert_eq!(VolumeAttributes::default().quota(&class), QuotaMode::None);
        assert_eq!(both.reservation(Bytes::gib(4)), Some(Bytes::gib(4)));
        assert_eq!(both.with(&parse(&[("reservation", "none")]).unwrap()).reservation(Bytes::gib(4)), None);
    }

    #[test]
    fn a_schedule_can_be_changed_turned_off_and_left_to_the_class() {
        let class = VolumeParameters::parse([("snapshotSchedule", "hourly=24")]).unwrap();
        let of = |pairs: &[(&str, &str)]| {
            let schedule = parse(pairs).unwrap().snapshot_schedule(&class);
            schedule.map(|schedule| schedule.to_string())
        };
        assert_eq!(of(&[("atime", "on")]), Some("hourly=24".into()));
        assert_eq!(of(&[("snapshotSchedule", "weekly=4  daily=7")]), Some("daily=7 weekly=4".into()));
        assert_eq!(of(&[("snapshotSchedule", "none")]), None);
        assert_eq!(of(&[("snapshotSchedule", "")]), None);
    }

    #[test]
    fn what_cannot_change_is_refused_with_what_can() {
        for (key, value, want) in [
            ("ashift", "12", "\"ashift\" can't be changed; what can: atime, autotrim, compression"),
            ("encryption", "off", "\"encryption\" can't be changed"),
            ("zfsAccess", "volume", "\"zfsAccess\" can't be changed"),
            ("speed", "fast", "\"speed\" is not known; allowed are: atime, autotrim, compression"),
            ("compression", "best", "lz4"),
            ("quota", "yes", "refquota, quota, none"),
            ("reservation", "lots", "none, or a size"),
            (
                "snapshotSchedule",
                "yearly=1",
                "snapshotSchedule: \"yearly=1\" is not allowed; allowed is: none, or each of",
            ),
            ("snapdir", "disabled", "hidden, visible"),
        ] {
            let error = parse(&[(key, value)]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
