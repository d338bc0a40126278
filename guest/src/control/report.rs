//! What is told of the volumes, within the 128 KiB that the node takes of a report: 64 volumes, with their texts cut shorter
//! where all of them have much to tell.

use std::time::Duration;

use prost::Message as _;
use zpod_proto::bounded::LONG;
use zpod_proto::guest::last_scrub::State;
use zpod_proto::guest::rolled_back::State as RolledBackState;
use zpod_proto::guest::{Health, LastScrub, RolledBack, SnapshotsPaused, StatusResponse, VolumeStatus};

use crate::machine::{self, Machine};
use crate::volumes::Volumes;
use crate::volumes::rollback;
use crate::volumes::schedule::Paused;
use crate::volumes::status::Snapshot;

/// Volumes that are told of. No pod has more.
const VOLUMES: usize = 64;
/// Bytes of a text for a person. The node shows no more.
const TEXT: usize = 512;
/// Bytes that are left of each, however many there are.
const LEAST: usize = 32;
/// Bytes of a version.
const VERSION: usize = 64;
/// Containers of a volume that are told, and bytes of the name of each: as long as containerd's are.
const CONTAINERS: usize = 8;
const CONTAINER: usize = 64;

/// All that is told, with details no older than `age`.
pub(super) async fn state<M: Machine>(volumes: &Volumes<M>, age: Duration) -> StatusResponse {
    fitting(StatusResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        zfs_version: cut(volumes.machine().zfs_version(), VERSION),
        volumes: volumes.status(age).await.into_iter().take(VOLUMES).map(volume_status).collect(),
    })
}

/// With texts no longer than there is room for.
fn fitting(mut report: StatusResponse) -> StatusResponse {
    let mut most = TEXT;
    while report.encoded_len() > LONG && most > LEAST {
        most /= 2;
        for volume in &mut report.volumes {
            let rolled_back = volume.rolled_back.as_mut().map(|rolled_back| &mut rolled_back.message);
            let texts = [&mut volume.message, &mut volume.refusal, &mut volume.trouble];
            for text in texts.into_iter().chain(rolled_back) {
                *text = cut(std::mem::take(text), most);
            }
        }
    }
    report
}

fn volume_status(snapshot: Snapshot) -> VolumeStatus {
    let message = cut(snapshot.problem().unwrap_or_default(), TEXT);
    let (usage, details) = (snapshot.usage, snapshot.details);
    VolumeStatus {
        volume_id: snapshot.id.to_string(),
        pool: snapshot.pool.to_string(),
        health: match snapshot.health {
            None => Health::Unavail,
            Some(machine::Health::Online) => Health::Online,
            Some(machine::Health::Degraded) => Health::Degraded,
            Some(machine::Health::Faulted) => Health::Faulted,
            Some(machine::Health::Unavailable) => Health::Unavail,
            Some(machine::Health::Suspended) => Health::Suspended,
        }
        .into(),
        message,
        total_bytes: usage.total_bytes,
        used_bytes: usage.used_bytes,
        available_bytes: usage.available_bytes,
        total_inodes: usage.total_inodes,
        used_inodes: usage.used_inodes,
        available_inodes: usage.available_inodes,
        partition_bytes: snapshot.partition.0,
        disk_bytes: snapshot.disk.0,
        pool_allocated_bytes: details.report.allocated,
        compress_ratio: details.compress_ratio,
        read_errors: details.report.read_errors,
        write_errors: details.report.write_errors,
        checksum_errors: details.report.checksum_errors,
        data_errors: details.report.data_errors,
        containers: snapshot.containers.into_iter().take(CONTAINERS).map(|id| cut(id, CONTAINER)).collect(),
        quota_bytes: snapshot.quota,
        token: snapshot.token.to_string(),
        scrub: details.report.scrub.map(last_scrub),
        refusal: cut(snapshot.refusal.unwrap_or_default(), TEXT),
        awaits_key: snapshot.awaits_key,
        encrypted: snapshot.encrypted,
        block: snapshot.block,
        snapshot_bytes: details.snapshot_bytes,
        dataset_bytes: details.dataset_bytes,
        children_bytes: details.children_bytes,
        snapshots_paused: match snapshot.paused {
            None => SnapshotsPaused::Not,
            Some(Paused::NoRoom) => SnapshotsPaused::NoRoom,
            Some(Paused::Failing) => SnapshotsPaused::Failing,
        }
        .into(),
        trouble: cut(snapshot.trouble.unwrap_or_default(), TEXT),
        rolled_back: snapshot.rolled_back.map(rolled_back),
        behind: snapshot.behind.map_or(0, |half| half.index() as u32 + 1),
    }
}

fn last_scrub(scrub: machine::LastScrub) -> LastScrub {
    let state = match scrub.state {
        machine::ScrubState::Running => State::Running,
        machine::ScrubState::Paused => State::Paused,
        machine::ScrubState::Finished => State::Finished,
        machine::ScrubState::Canceled => State::Canceled,
    };
    LastScrub { state: state.into(), ended: scrub.ended, errors: scrub.errors, bytes: scrub.bytes }
}

fn rolled_back(rolled_back: rollback::RolledBack) -> RolledBack {
    let state = if rolled_back.refused.is_some() { RolledBackState::Refused } else { RolledBackState::Done };
    let message = cut(rolled_back.refused.unwrap_or_default(), TEXT);
    RolledBack { id: rolled_back.id.to_string(), state: state.into(), message }
}

/// At most this many bytes of a text, and no half of a character.
fn cut(mut text: String, most: usize) -> String {
    let end = (0..=most.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.truncate(end.unwrap_or_default());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;
    use zpod_volume::{Bytes, Half, VolumeId};

    use crate::machine::{PoolReport, Usage};
    use crate::volumes::status::Details;

    #[test]
    fn a_text_is_cut_between_characters_and_a_short_one_stays() {
        assert_eq!(cut("abc".into(), 3), "abc");
        assert_eq!(cut("aé".into(), 2), "a", "é has two bytes");
        assert_eq!(cut("😀😀".into(), 7), "😀");
        assert_eq!(cut("😀".into(), 3), "");
    }

    #[test]
    fn the_longest_report_of_64_volumes_is_within_what_the_node_takes() {
        let most = u64::MAX;
        let scrub = machine::LastScrub { state: machine::ScrubState::Canceled, ended: most, errors: most, bytes: most };
        let usage = Usage {
            total_bytes: most,
            used_bytes: most,
            available_bytes: most,
            total_inodes: most,
            used_inodes: most,
            available_inodes: most,
        };
        let report = PoolReport {
            allocated: most,
            read_errors: most,
            write_errors: most,
            checksum_errors: most,
            data_errors: most,
            scrub: Some(scrub),
            message: "é".repeat(10_000),
            ..PoolReport::default()
        };
        let snapshot = Snapshot {
            id: VolumeId::from_name("a"),
            token: Uuid::from_u128(most.into()),
            pool: format!("zpod-{}", "p".repeat(59)).parse().unwrap(),
            health: Some(machine::Health::Suspended),
            usage,
            partition: Bytes(most),
            disk: Bytes(most),
            quota: most,
            containers: (0..1000).map(|number| format!("{number:0>64}")).collect(),
            awaits_key: true,
            encrypted: true,
            block: true,
            behind: Some(Half::Second),
            details: Details {
                report,
                compress_ratio: 1.5,
                snapshot_bytes: most,
                dataset_bytes: most,
                children_bytes: most,
                device: usage,
            },
            paused: Some(Paused::Failing),
            rolled_back: Some(rollback::RolledBack { id: Uuid::from_u128(1), refused: Some("é".repeat(128)) }),
            refusal: Some("é".repeat(10_000)),
            trouble: Some("é".repeat(10_000)),
        };
        let status = volume_status(snapshot);
        assert_eq!((status.message.len(), status.refusal.len(), status.containers.len()), (TEXT, TEXT, CONTAINERS));
        let version = "v".repeat(VERSION);
        let all = |count| StatusResponse {
            version: version.clone(),
            zfs_version: version.clone(),
            volumes: vec![status.clone(); count],
        };
        assert_eq!(fitting(all(VOLUMES / 2)), all(VOLUMES / 2), "nothing is cut where there is room");
        let report = fitting(all(VOLUMES));
        println!("{} bytes", report.encoded_len());
        assert!(report.encoded_len() <= LONG, "{} bytes", report.encoded_len());
        assert!(report.volumes[0].message.len() >= TEXT / 4, "{}", report.volumes[0].message.len());
        // Something is left of each, whatever else there is.
        let pool = "p".repeat(LONG);
        let report = fitting(StatusResponse { volumes: vec![VolumeStatus { pool, ..status.clone() }], ..all(0) });
        assert_eq!(report.volumes[0].rolled_back.as_ref().unwrap().message, "é".repeat(LEAST / 2));
    }
}
