//! What changes of a running volume: properties, what its capacity limits, what is kept for it.

use zpod_volume::{Bytes, Property, PropertyKind, QuotaMode, SnapshotSchedule, VolumeId, VolumeMode, VolumeSpec};

use super::Volumes;
use super::bounds::Bounds;
use crate::error::VolumeError;
use crate::machine::{Machine, Properties};

/// What is to change. What is left out stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Properties of the pool.
    pub pool: Properties,
    /// Properties of the dataset.
    pub dataset: Properties,
    /// What the capacity limits.
    pub quota: Option<QuotaMode>,
    /// What is kept for the volume's own contents; zero for nothing.
    pub reservation: Option<Bytes>,
    /// The snapshots that are taken by themselves; `Some(None)` for none.
    pub schedule: Option<Option<SnapshotSchedule>>,
}

impl Attributes {
    /// The spec with these in it.
    fn applied(&self, spec: &VolumeSpec) -> VolumeSpec {
        let mut spec = spec.clone();
        spec.pool_properties.extend(self.pool.clone());
        spec.dataset_properties.extend(self.dataset.clone());
        spec.quota = self.quota.unwrap_or(spec.quota);
        spec.reservation = match self.reservation {
            Some(bytes) => Some(bytes).filter(|bytes| bytes.0 > 0),
            None => spec.reservation,
        };
        if let Some(schedule) = &self.schedule {
            spec.snapshot_schedule.clone_from(schedule);
        }
        spec
    }

    fn check(&self, id: VolumeId, mode: VolumeMode) -> Result<(), VolumeError> {
        for (kind, properties) in [(PropertyKind::Pool, &self.pool), (PropertyKind::Dataset, &self.dataset)] {
            for (key, value) in properties {
                check(id, kind, mode, key, value)?;
            }
        }
        if self.quota.is_some() && !mode.is_filesystem() {
            let reason = "a block device has no quota: its size is its capacity".to_owned();
            return Err(VolumeError::Invalid { id, reason });
        }
        Ok(())
    }
}

impl<M: Machine> Volumes<M> {
    /// Changes a running volume.
    ///
    /// # Errors
    /// When a property is unknown, of the wrong kind or not allowed that value, or the volume holds more than the new
    /// quota allows; then nothing is changed.
    pub async fn change(&self, id: VolumeId, attributes: &Attributes) -> Result<(), VolumeError> {
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, mut active) = self.known(id)?;
        let mode = active.request.spec.mode;
        attributes.check(id, mode)?;
        active.must_be_writable(id)?;
        let spec = attributes.applied(&active.request.spec);
        let (dataset, failed) = (spec.dataset(), |fault| VolumeError::failed(id, "setting its properties", fault));
        let bounds = match (attributes.quota, attributes.reservation) {
            (None, None) => None,
            _ => {
                let now = self.machine.dataset(&dataset).await.map_err(failed)?.unwrap_or_default();
                Some(Bounds::of(&spec).changes(&now))
            }
        };
        if let Some(reason) = bounds.as_ref().and_then(|bounds| bounds.refused.clone()) {
            return Err(VolumeError::NoRoom { id, reason });
        }
        for (key, value) in &attributes.pool {
            self.machine.set_pool(&spec.pool, key, value).await.map_err(failed)?;
        }
        let mut changes: Vec<_> = attributes.dataset.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        changes.extend(bounds.iter().flat_map(|bounds| bounds.first.iter().cloned()));
        if !changes.is_empty() {
            self.machine.set_dataset(&dataset, &changes).await.map_err(failed)?;
        }
        let kept = bounds.as_ref().and_then(|bounds| bounds.then.clone());
        active.quota = bounds.map_or(active.quota, |bounds| bounds.bound);
        // The next container of a file system comes with what the node has made of its spec since: that is set then.
        active.request.spec = spec.clone();
        {
            let mut state = volume.state();
            state.active = Some(active);
            state.details = None;
        }
        self.scheduled.notify_one();
        if let Some(kept) = kept {
            let set = self.machine.set_dataset(&dataset, &[kept]).await;
            let reason = |fault| format!("the space that is to be kept for it is not there: {fault}");
            set.map_err(|fault| VolumeError::NoRoom { id, reason: reason(fault) })?;
        }
        volume.remember(spec);
        Ok(())
    }
}

fn check(id: VolumeId, kind: PropertyKind, mode: VolumeMode, key: &str, value: &str) -> Result<(), VolumeError> {
    let reason = match Property::named(key) {
        None => "it is not known".to_owned(),
        Some(known) if known.kind != kind => "it can't be set there on a running volume".to_owned(),
        Some(known) if !known.block && !mode.is_filesystem() => "a block device has none".to_owned(),
        Some(known) if !known.allows(value) => format!("{value:?} is not allowed; allowed is: {}", known.allowed()),
        Some(_) => return Ok(()),
    };
    let key: String = key.chars().take(64).collect();
    Err(VolumeError::Invalid { id, reason: format!("property {key:?}: {reason}") })
}

#[cfg(test)]
mod tests {
    use super::super::Wanted;
    use super::super::tests::{disks, guest, prepare, wanted};
    use super::*;
    use std::time::Duration;
    use zpod_volume::Create;

    fn one(key: &str, value: &str) -> Properties {
        [(key.to_owned(), value.to_owned())].into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_running_volume_changes_and_the_next_start_with_an_old_spec_sets_the_old_values() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let volume = wanted("a", Create::Fresh, "/m1");
        let id = volume.spec.id;
        let _ = prepare(&volumes, "c1", volume.clone()).await.unwrap();
        let all = Attributes {
            pool: one("autotrim", "off"),
            dataset: one("compression", "zstd"),
            quota: Some(QuotaMode::Quota),
            reservation: Some(Bytes::mib(512)),
            schedule: Some(Some("hourly=24".parse().unwrap())),
        };
        for _ in 0..2 {
            volumes.change(id, &all).await.unwrap();
            let (dataset, pool) = volumes.properties(id).await.unwrap();
            let get = |key: &str| dataset[key].as_str();
            assert_eq!((get("compression"), pool["autotrim"].as_str()), ("zstd", "off"));
            assert_eq!((get("quota"), get("refquota"), get("refreservation")), ("1073741824", "none", "536870912"));
            assert_eq!(volumes.status(Duration::ZERO).await[0].quota, 1 << 30);
        }
        // Growth goes on with the new mode.
        let two = Bytes::gib(2);
        volumes.grow(id, two, zpod_volume::DiskLayout::partition_for(two)).await.unwrap();
        assert_eq!(volumes.properties(id).await.unwrap().0["quota"], two.0.to_string());
        volumes.change(id, &Attributes { reservation: Some(Bytes(0)), ..Attributes::default() }).await.unwrap();
        assert_eq!(volumes.properties(id).await.unwrap().0["refreservation"], "none");
        let none = Attributes { quota: Some(QuotaMode::None), ..Attributes::default() };
        volumes.change(id, &none).await.unwrap();
        assert_eq!((volumes.properties(id).await.unwrap().0["quota"].as_str(), one_quota(&volumes).await), ("none", 0));
        let back = Attributes { quota: Some(QuotaMode::Refquota), ..Attributes::default() };
        volumes.change(id, &back).await.unwrap();
        assert_eq!(one_quota(&volumes).await, two.0);

        let _ = prepare(&volumes, "c2", Wanted { mount_point: "/m2".into(), ..volume }).await.unwrap();
        assert_eq!(volumes.properties(id).await.unwrap().0["compression"], "lz4");
    }

    #[tokio::test(start_paused = true)]
    async fn a_block_device_keeps_what_it_was_changed_to_when_its_container_starts_again_with_the_same_note() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let mut volume = wanted("a", Create::Fresh, "/dev/xvda");
        (volume.spec.mode, volume.fs_group) = (VolumeMode::Block, None);
        let id = volume.spec.id;
        let _ = prepare(&volumes, "c1", volume.clone()).await.unwrap();
        let more = Attributes {
            pool: one("autotrim", "off"),
            dataset: one("compression", "zstd"),
            reservation: Some(Bytes::gib(2)),
            ..Attributes::default()
        };
        let two = Bytes::gib(2);
        volumes.grow(id, two, zpod_volume::DiskLayout::partition_for(two)).await.unwrap();
        volumes.change(id, &more).await.unwrap();
        let steps = volumes.machine().steps();
        // Beside the container that has it, and after the last one that had.
        for container in ["c2", "c3"] {
            let _ = prepare(&volumes, container, volume.clone()).await.unwrap();
            let (dataset, pool) = volumes.properties(id).await.unwrap();
            let now = ["compression", "volsize", "refreservation"].map(|key| dataset[key].as_str());
            assert_eq!(now, ["zstd", "2147483648", "2147483648"], "{container}");
            assert_eq!(pool["autotrim"], "off");
            assert_eq!(volumes.status(Duration::ZERO).await[0].quota, two.0);
            volumes.release_all().await;
            assert!(volumes.machine().imported().is_empty());
        }
        let later = &volumes.machine().steps()[steps.len()..];
        assert!(!later.iter().any(|step| step.starts_with("set ")), "{later:?}");
        // Another publication has a note of its own, which is newer.
        volume.spec.token = uuid::Uuid::from_u128(8);
        let _ = prepare(&volumes, "c4", volume).await.unwrap();
        assert_eq!(volumes.properties(id).await.unwrap().0["compression"], "lz4");
    }

    async fn one_quota<M: Machine>(volumes: &Volumes<M>) -> u64 {
        volumes.status(Duration::ZERO).await[0].quota
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_is_refused_before_anything_is_changed() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let volume = wanted("a", Create::Fresh, "/m1");
        let (id, dataset) = (volume.spec.id, volume.spec.dataset());
        let _ = prepare(&volumes, "c1", volume).await.unwrap();
        let steps = volumes.machine().steps().len();
        for (pool, properties, want) in [
            (one("compression", "lz4"), one("compression", "zstd"), "can't be set there"),
            (Properties::new(), one("compression", "best"), "\"best\" is not allowed"),
            (Properties::new(), one("mountpoint", "/"), "it is not known"),
        ] {
            let attributes = Attributes { pool, dataset: properties, ..Attributes::default() };
            let error = volumes.change(id, &attributes).await.unwrap_err();
            assert!(error.to_string().contains(want), "{error}");
            assert_eq!(error.code(), tonic::Code::InvalidArgument);
        }
        assert_eq!(volumes.machine().steps().len(), steps);

        let used = ("used".to_owned(), Bytes::gib(3).0.to_string());
        volumes.machine().set_dataset(&dataset, &[used]).await.unwrap();
        let smaller =
            Attributes { quota: Some(QuotaMode::Quota), dataset: one("atime", "on"), ..Attributes::default() };
        let error = volumes.change(id, &smaller).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        assert!(error.to_string().contains("holds 3 GiB already"), "{error}");
        let now = volumes.properties(id).await.unwrap().0;
        assert_eq!((now["refquota"].as_str(), now.get("atime")), ("1073741824", None));
    }
}
