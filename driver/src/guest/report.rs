use uuid::Uuid;
use zpod_proto::guest::last_scrub::State as WireState;
use zpod_proto::guest::rolled_back::State as WireRolledBack;
use zpod_proto::guest::{Health as WireHealth, LastScrub, SnapshotsPaused, StatusResponse, VolumeStatus};
use zpod_volume::{Bytes, Half, TokenDigest, VolumeId};

/// No pod has more volumes; what a guest says beyond is passed over.
const MAX_VOLUMES: usize = 64;
const MAX_TEXT: usize = 512;
/// Larger than any volume, and far from where sums overflow.
const MAX_NUMBER: u64 = 1 << 60;
/// The largest ratio: a record of 16 MiB stored in one sector of 512 bytes.
const MAX_RATIO: f64 = 32_768.0;
/// The end of the year 9999: what a timestamp of RFC 3339 can say.
const MAX_TIME: u64 = 253_402_300_799;

/// What a guest said, cleaned.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Report {
    /// Version of zpod-guest, as it says.
    pub version: String,
    /// The volumes it says it has.
    pub volumes: Vec<VolumeReport>,
    /// Entries that made no sense, or were too many.
    pub dropped: usize,
}

/// What a guest said of one volume, cleaned: ids parsed, numbers bounded, text printable and short. Still hostile:
/// any of it may be a lie.
#[derive(Debug, Clone, PartialEq)]
pub struct VolumeReport {
    /// The volume it speaks of.
    pub id: VolumeId,
    /// What it offers as proof that the volume was given to it.
    pub token: Uuid,
    /// Health of the pool.
    pub health: Health,
    /// For a person: what is wrong. Empty when healthy.
    pub message: String,
    /// Total, used and available bytes, as df(1) shows them.
    pub bytes: Usage,
    /// Total, used and available inodes.
    pub inodes: Usage,
    /// The partition that bounds the pool.
    pub partition: Bytes,
    /// The disk as the guest sees it.
    pub disk: Bytes,
    /// The quota; zero for none.
    pub quota: Bytes,
    /// Files with permanent damage.
    pub data_errors: u64,
    /// Errors of the pool's device.
    pub errors: Errors,
    /// Space allocated in the pool, snapshots and metadata included.
    pub allocated: Bytes,
    /// Logical size over stored size, 1 and up.
    pub compress_ratio: f64,
    /// The scrub that runs, or the last one.
    pub scrub: Option<Scrub>,
    /// Why the last container that asked for the volume did not get it.
    pub refusal: Option<String>,
    /// What of it the containers that have it don't have: datasets that a tenant has made below its own.
    pub unmounted: Option<String>,
    /// It is encrypted, and the guest waits for its key.
    pub awaits_key: bool,
    /// The contents are encrypted.
    pub encrypted: bool,
    /// It is a block device.
    pub block: bool,
    /// Space that snapshots inside the guest alone hold.
    pub snapshots: Bytes,
    /// Space that its own contents hold.
    pub dataset: Bytes,
    /// Space that datasets below it hold.
    pub children: Bytes,
    /// Of a mirror: the half that lacks some of what the other one has.
    pub behind: Option<Half>,
    /// It is to take snapshots by itself, and takes none.
    pub paused: Option<Paused>,
    /// What came of the rollback that it was told to do.
    pub rolled_back: Option<RolledBack>,
    /// What this node itself knows to be wrong with it. Never the guest's word.
    pub trouble: Option<String>,
}

/// What came of a rollback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolledBack {
    /// The id of the request.
    pub id: Uuid,
    /// Why it was refused, where it was.
    pub refused: Option<String>,
}

impl RolledBack {
    fn new(told: &zpod_proto::guest::RolledBack) -> Option<Self> {
        let refused = match told.state() {
            WireRolledBack::Unknown => return None,
            WireRolledBack::Done => None,
            WireRolledBack::Refused => Some(clean(&told.message, MAX_TEXT)),
        };
        Some(Self { id: Uuid::try_parse(&told.id).ok()?, refused })
    }
}

/// Why a volume with a schedule takes no snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paused {
    /// Too little room would be left beside them.
    NoRoom,
    /// ZFS fails to take them.
    Failing,
}

impl Paused {
    /// For a person.
    pub const fn cause(self) -> &'static str {
        match self {
            Self::NoRoom => "less than a tenth of its room is free, or what is kept for it (reservation) leaves none",
            Self::Failing => "ZFS fails to take them, and the log of its guest says why",
        }
    }
}

/// How often the device of a pool failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Errors {
    /// Reads that failed.
    pub read: u64,
    /// Writes that failed.
    pub write: u64,
    /// Blocks that were not what was written.
    pub checksum: u64,
}

/// A scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scrub {
    /// How far it is.
    pub state: ScrubState,
    /// When it ended, in seconds since 1970 by the guest's clock.
    pub ended: Option<u64>,
    /// Errors it found.
    pub errors: u64,
    /// What it has examined.
    pub bytes: Bytes,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubState {
    /// It runs.
    Running,
    /// It waits to be resumed.
    Paused,
    /// It has seen everything.
    Finished,
    /// It was stopped.
    Canceled,
}

/// Total, used and available.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// All there is.
    pub total: u64,
    /// What is taken.
    pub used: u64,
    /// What can be taken.
    pub available: u64,
}

/// Health of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Health {
    /// Not known, or not yet.
    Unknown,
    /// All is well.
    Online,
    /// Running with damage.
    Degraded,
    /// Not usable.
    Faulted,
    /// I/O has stopped.
    Suspended,
    /// Not there.
    Unavailable,
}

impl Health {
    /// A word for it, as Kubernetes writes such words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "Unknown",
            Self::Online => "Online",
            Self::Degraded => "Degraded",
            Self::Faulted => "Faulted",
            Self::Suspended => "Suspended",
            Self::Unavailable => "Unavailable",
        }
    }

    /// Whether a pool with this health exists, imported in the guest.
    pub fn is_imported(self) -> bool {
        matches!(self, Self::Online | Self::Degraded | Self::Faulted | Self::Suspended)
    }
}

impl Report {
    pub(super) fn new(answer: StatusResponse) -> Self {
        let given = answer.volumes.len();
        let volumes: Vec<_> = answer.volumes.into_iter().take(MAX_VOLUMES).filter_map(VolumeReport::new).collect();
        Self { version: clean(&answer.version, 64), dropped: given - volumes.len(), volumes }
    }

    /// The entry of one volume.
    pub fn volume(&self, id: VolumeId, token: TokenDigest) -> Option<&VolumeReport> {
        self.volumes.iter().find(|volume| volume.id == id && token.is_of(volume.token))
    }
}

impl VolumeReport {
    fn new(status: VolumeStatus) -> Option<Self> {
        let health = match status.health() {
            WireHealth::Unknown => Health::Unknown,
            WireHealth::Online => Health::Online,
            WireHealth::Degraded => Health::Degraded,
            WireHealth::Faulted => Health::Faulted,
            WireHealth::Suspended => Health::Suspended,
            WireHealth::Unavail => Health::Unavailable,
        };
        let usage = |total, used, available| Usage {
            total: bound(total),
            used: bound(used).min(bound(total)),
            available: bound(available).min(bound(total)),
        };
        Some(Self {
            id: status.volume_id.parse().ok()?,
            token: Uuid::try_parse(&status.token).ok()?,
            health,
            message: clean(&status.message, MAX_TEXT),
            bytes: usage(status.total_bytes, status.used_bytes, status.available_bytes),
            inodes: usage(status.total_inodes, status.used_inodes, status.available_inodes),
            partition: Bytes(bound(status.partition_bytes)),
            disk: Bytes(bound(status.disk_bytes)),
            quota: Bytes(bound(status.quota_bytes)),
            data_errors: bound(status.data_errors),
            errors: Errors {
                read: bound(status.read_errors),
                write: bound(status.write_errors),
                checksum: bound(status.checksum_errors),
            },
            allocated: Bytes(bound(status.pool_allocated_bytes)),
            compress_ratio: ratio(status.compress_ratio),
            scrub: status.scrub.and_then(Scrub::new),
            refusal: Some(clean(&status.refusal, MAX_TEXT)).filter(|refusal| !refusal.is_empty()),
            unmounted: Some(clean(&status.trouble, MAX_TEXT)).filter(|unmounted| !unmounted.is_empty()),
            awaits_key: status.awaits_key,
            encrypted: status.encrypted,
            block: status.block,
            snapshots: Bytes(bound(status.snapshot_bytes)),
            dataset: Bytes(bound(status.dataset_bytes)),
            children: Bytes(bound(status.children_bytes)),
            behind: match status.behind {
                1 => Some(Half::First),
                2 => Some(Half::Second),
                _ => None,
            },
            paused: match status.snapshots_paused() {
                SnapshotsPaused::Not => None,
                SnapshotsPaused::NoRoom => Some(Paused::NoRoom),
                SnapshotsPaused::Failing => Some(Paused::Failing),
            },
            rolled_back: status.rolled_back.as_ref().and_then(RolledBack::new),
            trouble: None,
        })
    }
}

impl Scrub {
    fn new(scrub: LastScrub) -> Option<Self> {
        let state = match scrub.state() {
            WireState::Unknown => return None,
            WireState::Running => ScrubState::Running,
            WireState::Paused => ScrubState::Paused,
            WireState::Finished => ScrubState::Finished,
            WireState::Canceled => ScrubState::Canceled,
        };
        let ended = Some(scrub.ended).filter(|ended| (1..=MAX_TIME).contains(ended));
        Some(Self { state, ended, errors: bound(scrub.errors), bytes: Bytes(bound(scrub.bytes)) })
    }
}

/// Finite and within what ZFS can reach; what is not, is no compression.
fn ratio(ratio: f64) -> f64 {
    if ratio.is_finite() { ratio.clamp(1.0, MAX_RATIO) } else { 1.0 }
}

fn bound(number: u64) -> u64 {
    number.min(MAX_NUMBER)
}

/// At most `limit` characters, control characters and those that turn text around or can't be seen replaced by spaces:
/// fit for a log, an error and a terminal.
pub fn clean(text: &str, limit: usize) -> String {
    let printable = |c: char| if c.is_control() || is_unseen(c) { ' ' } else { c };
    let cleaned: String = text.chars().take(limit).map(printable).collect();
    cleaned.trim().to_owned()
}

/// Format characters, variation selectors and private use: they turn text around, can't be seen, or mean nothing.
fn is_unseen(c: char) -> bool {
    matches!(c,
        '\u{AD}' | '\u{34F}' | '\u{600}'..='\u{605}' | '\u{61C}' | '\u{6DD}' | '\u{70F}' | '\u{180B}'..='\u{180F}'
        | '\u{200B}'..='\u{200F}' | '\u{2028}'..='\u{202E}' | '\u{2060}'..='\u{206F}' | '\u{E000}'..='\u{F8FF}'
        | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}' | '\u{FFF9}'..='\u{FFFB}' | '\u{E0000}'..='\u{E0FFF}'
        | '\u{F0000}'..='\u{10FFFF}')
}

#[cfg(test)]
impl VolumeReport {
    /// What a healthy guest says that has nothing to tell.
    pub(crate) fn online(id: VolumeId) -> Self {
        let status = VolumeStatus {
            volume_id: id.to_string(),
            token: Uuid::from_u128(1).to_string(),
            health: WireHealth::Online.into(),
            ..VolumeStatus::default()
        };
        Self { refusal: None, ..Self::new(status).unwrap_or_else(|| unreachable!("id and token are sound")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn status() -> VolumeStatus {
        VolumeStatus {
            volume_id: VolumeId::from_name("pvc-1").to_string(),
            token: Uuid::from_u128(1).to_string(),
            ..VolumeStatus::default()
        }
    }

    #[test]
    fn numbers_that_no_volume_has_are_bounded() {
        let status = VolumeStatus {
            total_bytes: u64::MAX,
            used_bytes: u64::MAX,
            available_inodes: u64::MAX,
            disk_bytes: u64::MAX,
            ..status()
        };
        let report = VolumeReport::new(status).unwrap();
        assert_eq!(report.bytes.total, MAX_NUMBER);
        assert!(i64::try_from(report.bytes.used).is_ok());
        assert_eq!(report.inodes.available, 0, "no more than the total");
        assert_eq!(report.disk.0, MAX_NUMBER);
    }

    #[test]
    fn a_ratio_that_is_none_is_no_compression_and_a_time_that_is_none_is_left_out() {
        for (given, want) in [(2.5, 2.5), (0.0, 1.0), (-1.0, 1.0), (1e300, MAX_RATIO), (f64::NAN, 1.0)] {
            let report = VolumeReport::new(VolumeStatus { compress_ratio: given, ..status() }).unwrap();
            assert_eq!(report.compress_ratio, want, "{given}");
        }
        for (ended, want) in [(0, None), (1_763_900_000, Some(1_763_900_000)), (u64::MAX, None)] {
            let scrub = LastScrub { state: WireState::Finished.into(), ended, errors: u64::MAX, bytes: 7 };
            let report = VolumeReport::new(VolumeStatus { scrub: Some(scrub), ..status() }).unwrap();
            let want = Scrub { state: ScrubState::Finished, ended: want, errors: MAX_NUMBER, bytes: Bytes(7) };
            assert_eq!(report.scrub, Some(want));
        }
        let unknown = LastScrub { state: 99, ..LastScrub::default() };
        assert_eq!(VolumeReport::new(VolumeStatus { scrub: Some(unknown), ..status() }).unwrap().scrub, None);
    }

    #[test]
    fn what_came_of_a_rollback_is_cleaned_and_one_of_no_request_is_left_out() {
        let told = |id: &str, state: i32, message: &str| {
            let rolled_back = zpod_proto::guest::RolledBack { id: id.into(), state, message: message.into() };
            VolumeReport::new(VolumeStatus { rolled_back: Some(rolled_back), ..status() }).unwrap().rolled_back
        };
        let id = Uuid::from_u128(4);
        let text = id.to_string();
        assert_eq!(told(&text, WireRolledBack::Done.into(), "x"), Some(RolledBack { id, refused: None }));
        let refused = told(&text, WireRolledBack::Refused.into(), &format!("a\nb{}", "x".repeat(9999))).unwrap();
        let reason = refused.refused.unwrap();
        assert!(reason.starts_with("a bx") && reason.len() <= MAX_TEXT, "{reason}");
        assert_eq!(told(&text, 77, ""), None);
        assert_eq!(told("../x", WireRolledBack::Done.into(), ""), None);
    }

    #[test]
    fn text_of_a_guest_cannot_forge_log_lines_or_fill_them() {
        let text = format!("a\nERROR forged\u{1b}[2J\u{202e}{}", "x".repeat(5000));
        let report = VolumeReport::new(VolumeStatus { message: text, ..status() }).unwrap();
        assert!(report.message.chars().count() <= MAX_TEXT);
        assert!(!report.message.chars().any(|c| c.is_control() || c == '\u{202e}'), "{}", report.message);
    }

    #[test]
    fn characters_that_turn_text_around_or_cannot_be_seen_become_spaces() {
        for c in "\u{AD}\u{61C}\u{180E}\u{200B}\u{200E}\u{200F}\u{2028}\u{202E}\u{2060}\u{2066}\u{206F}\u{FE0F}\u{FEFF}\u{FFF9}\u{FFFB}\u{E0001}\u{E007F}\u{E0100}\u{E000}\u{F0000}\u{10FFFD}".chars() {
            assert_eq!(clean(&format!("a{c}b"), 9), "a b", "{c:?}");
        }
        assert_eq!(clean("Grüße, 世界 ✓ 😀", 99), "Grüße, 世界 ✓ 😀");
    }

    #[test]
    fn entries_without_an_id_or_a_token_and_entries_beyond_the_bound_are_dropped() {
        let bad_id = VolumeStatus { volume_id: "../../etc".into(), ..status() };
        let bad_token = VolumeStatus { token: String::new(), ..status() };
        let mut volumes = vec![bad_id, bad_token];
        volumes.extend(vec![status(); 1000]);
        let report = Report::new(StatusResponse { volumes, ..StatusResponse::default() });
        assert_eq!(report.volumes.len(), MAX_VOLUMES - 2);
        assert_eq!(report.dropped, 1002 - report.volumes.len());
    }

    proptest! {
        #[test]
        fn cleaned_text_is_short_and_printable(text in any::<String>(), limit in 0usize..100) {
            let cleaned = clean(&text, limit);
            prop_assert!(cleaned.chars().count() <= limit);
            prop_assert!(!cleaned.chars().any(char::is_control));
        }
    }
}
