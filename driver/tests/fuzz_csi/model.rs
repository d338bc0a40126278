//! What must be there by now, as far as the answers say, and what may be answered next.
//!
//! The model knows CSI and zpod's documentation, not zpod's code: each call is judged by the state it meets. An answer that
//! is allowed changes the state; another one is a violation. Judging has no other effect, so that calls that were made
//! at once can be tried in each order.

#[path = "model/publications.rs"]
mod publications;
#[path = "model/snapshots.rs"]
mod snapshots;
#[path = "model/volumes.rs"]
mod volumes;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use tonic::Code;
use zpod_proto::csi;
use zpod_volume::{Bytes, VolumeParameters};

use crate::call::{Answer, Call, Reply};
use crate::disk::State;

/// Where patterns are written, in bytes from the start of the disk: inside the smallest partition there is.
pub(crate) const PLACES: [u64; 4] = [1 << 20, 65 << 20, 201 << 20, 401 << 20];

/// Which pattern is at each of [`PLACES`]; zero for none.
pub(crate) type Content = [u64; PLACES.len()];

/// Something that is known, or not for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sure {
    No,
    Maybe,
    Yes,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Volume {
    pub(crate) name: String,
    pub(crate) capacity: i64,
    pub(crate) parameters: VolumeParameters,
    /// As they were given.
    pub(crate) given: HashMap<String, String>,
    pub(crate) block: bool,
    pub(crate) source: Option<csi::VolumeContentSource>,
    pub(crate) ephemeral: bool,
    pub(crate) published: Option<Published>,
    pub(crate) content: Content,
    /// Whether a guest has reported a pool in it.
    pub(crate) initialized: Sure,
    /// Of a copy: whether a guest had reported a pool in what it was made from.
    pub(crate) copied: Option<Sure>,
    /// Nothing was ever written to it when it was published last.
    pub(crate) blank: bool,
    /// Whether it had been a pool by then.
    pub(crate) told: Sure,
    /// A virtual machine has it open.
    pub(crate) used: bool,
    /// Its guest reports.
    pub(crate) reports: bool,
    /// zpod hears the guest that has it.
    pub(crate) heard: Sure,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Published {
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) group: String,
    pub(crate) flags: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Snapshot {
    pub(crate) name: String,
    pub(crate) volume: String,
    pub(crate) group: Option<String>,
    pub(crate) size: i64,
    pub(crate) allow_copy: bool,
    pub(crate) block: bool,
    pub(crate) encrypted: bool,
    pub(crate) content: Content,
    pub(crate) initialized: Sure,
}

/// The state.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Model {
    /// Whether files share blocks here.
    pub(crate) shares: bool,
    /// How many times the room is promised.
    pub(crate) overprovision: f64,
    pub(crate) disk: State,
    /// By id.
    pub(crate) volumes: BTreeMap<String, Volume>,
    pub(crate) snapshots: BTreeMap<String, Snapshot>,
    /// Names of groups, by id.
    pub(crate) groups: BTreeMap<String, String>,
    /// The largest volume that GetCapacity has just offered.
    pub(crate) offered: Option<i64>,
    /// A volume of that size was refused for lack of room: so GetCapacity must not offer it.
    pub(crate) refused: Option<i64>,
}

/// Nothing, or what is wrong.
pub(crate) type Judged = Result<(), String>;

impl Model {
    pub(crate) fn new(shares: bool, overprovision: f64) -> Self {
        Self {
            shares,
            overprovision,
            disk: State::Free,
            volumes: BTreeMap::new(),
            snapshots: BTreeMap::new(),
            groups: BTreeMap::new(),
            offered: None,
            refused: None,
        }
    }

    /// Judges an answer and takes in what it means.
    pub(crate) fn judge(&mut self, call: &Call, answer: &Answer) -> Judged {
        let offered = self.offered.take();
        if let Err(status) = answer
            && matches!(status.code(), Code::Internal | Code::Unknown | Code::DataLoss | Code::Unimplemented)
        {
            return Err(format!("{:?} is never an answer: {}", status.code(), status.message()));
        }
        match (call, answer) {
            (Call::CreateVolume(request), _) => self.create_volume(request, answer, offered),
            (Call::DeleteVolume(request), _) => self.delete_volume(&request.volume_id, answer),
            (Call::Expand(request), _) => self.expand(request, answer),
            (Call::Modify(request), _) => self.modify(request, answer),
            (Call::Get(request), _) => self.get(&request.volume_id, answer),
            (Call::Validate(request), _) => self.exists(&request.volume_id, answer),
            (Call::CreateSnapshot(request), _) => self.create_snapshot(request, answer),
            (Call::DeleteSnapshot(request), _) => self.delete_snapshot(&request.snapshot_id, answer),
            (Call::GetSnapshot(request), _) => self.get_snapshot(&request.snapshot_id, answer),
            (Call::CreateGroup(request), _) => self.create_group(request, answer),
            (Call::DeleteGroup(request), _) => self.delete_group(&request.group_snapshot_id, answer),
            (Call::GetGroup(request), _) => self.get_group(&request.group_snapshot_id, answer),
            (Call::Stage(request), _) => self.exists(&request.volume_id, answer),
            (Call::Publish(request), _) => self.publish(request, answer),
            (Call::Unpublish(request), _) => self.unpublish(request, answer),
            (Call::Stats(request), _) => self.stats(request, answer),
            (Call::NodeExpand(request), _) => self.node_expand(request, answer),
            (Call::Probe(_), Ok(Reply::Probe(probe))) if probe.ready != Some(true) => Err("it is not ready".into()),
            // What lists say is compared with everything there is, after each call.
            (
                Call::Unstage(_)
                | Call::ListVolumes(_)
                | Call::ListSnapshots(_)
                | Call::Capacity(_)
                | Call::NodeInfo(_)
                | Call::Probe(_)
                | Call::PluginInfo(_),
                _,
            ) => done(answer, &[]).map(drop),
        }
    }

    /// Judges the answers to calls that were made at once: there must be an order that explains them all. What was aborted
    /// has not happened, nor what met a name that another of them took and gave back. Gives the state after each order that
    /// does: answers alone don't tell which one it was.
    pub(crate) fn judge_at_once(&self, made: &[(Call, Answer)]) -> Result<Vec<Self>, String> {
        // Another call may make room.
        let before = Self { offered: None, refused: None, ..self.clone() };
        let (mut explained, mut why) = (Vec::new(), String::new());
        for order in orders(made.len()) {
            let mut state = before.clone();
            let judged = order.iter().map(|at| &made[*at]).try_for_each(|(call, answer)| match answer {
                Err(status) if status.code() == Code::Aborted => Ok(()),
                Err(status) if status.code() == Code::AlreadyExists && was_taken(call, made) => Ok(()),
                answer => state.judge(call, answer).map_err(|wrong| format!("{call:?}: {wrong}")),
            });
            state.refused = None;
            match judged {
                Ok(()) if explained.contains(&state) => {}
                Ok(()) => explained.push(state),
                Err(wrong) => why = wrong,
            }
        }
        if explained.is_empty() {
            return Err(format!("no order explains these answers; in the last one tried: {why}"));
        }
        Ok(explained)
    }

    /// zpod is another process: it has to find its guests anew.
    pub(crate) fn restarted(&mut self) {
        self.offered = None;
        for volume in self.volumes.values_mut() {
            volume.heard = if volume.reports { Sure::Maybe } else { Sure::No };
        }
    }

    /// Notes that there was no room for a volume of that size, where it is certain what that means.
    fn no_room(&mut self, size: i64) {
        self.refused = (self.disk == State::Free && self.overprovision <= 1.0).then_some(size);
    }

    /// Why a volume of that size may be refused.
    fn too_large(&self, size: i64) -> &'static [Code] {
        let on_ext4 = !self.shares && size > LONGEST_ON_EXT4;
        if on_ext4 { &[Code::ResourceExhausted, Code::OutOfRange] } else { &[Code::ResourceExhausted] }
    }

    /// Whether something new may be refused since the disk is full or can't be written to.
    fn hindered(&self, status: &tonic::Status) -> bool {
        let told = matches!(
            status.code(),
            Code::ResourceExhausted | Code::Unavailable | Code::FailedPrecondition | Code::OutOfRange
        );
        self.disk != State::Free && told
    }

    /// That something was refused for one of these reasons, or because the disk is as it is.
    fn refused(&self, answer: &Answer, reasons: &[Code]) -> Judged {
        match answer {
            Err(status) if reasons.contains(&status.code()) || self.hindered(status) => Ok(()),
            Err(status) => Err(format!("{:?} instead of {reasons:?}: {}", status.code(), status.message())),
            Ok(_) => Err(format!("it was done; it had to be refused ({reasons:?})")),
        }
    }

    /// What was answered, or nothing where something new was refused for one of these reasons.
    fn made<'a>(&self, answer: &'a Answer, reasons: &[Code]) -> Result<Option<&'a Reply>, String> {
        match answer {
            Err(status) if self.hindered(status) => Ok(None),
            answer => done(answer, reasons),
        }
    }
}

/// No file of ext4 is as long as this.
const LONGEST_ON_EXT4: i64 = 14 << 40;

/// What was answered, or nothing where it was refused for one of these reasons.
fn done<'a>(answer: &'a Answer, reasons: &[Code]) -> Result<Option<&'a Reply>, String> {
    match answer {
        Ok(reply) => Ok(Some(reply)),
        Err(status) if reasons.contains(&status.code()) => Ok(None),
        Err(status) => Err(format!("it was refused ({:?}): {}", status.code(), status.message())),
    }
}

/// Whether another one of the calls that were made at once wanted the same name and failed.
fn was_taken(call: &Call, made: &[(Call, Answer)]) -> bool {
    let name = call.name();
    name.is_some() && made.iter().any(|(other, answer)| answer.is_err() && other != call && other.name() == name)
}

/// All orders of so many.
fn orders(of: usize) -> Vec<Vec<usize>> {
    let mut orders = vec![Vec::new()];
    for _ in 0..of {
        let longer = |order: Vec<usize>| {
            let rest = (0..of).filter(|at| !order.contains(at)).collect::<Vec<_>>();
            rest.into_iter().map(move |at| order.iter().copied().chain([at]).collect())
        };
        orders = orders.into_iter().flat_map(longer).collect();
    }
    orders
}

/// The size that a range asks for.
fn wanted(range: Option<&csi::CapacityRange>, otherwise: i64) -> i64 {
    let range = range.copied().unwrap_or_default();
    match (range.required_bytes, range.limit_bytes) {
        (0, 0) => otherwise,
        (0, limit) => otherwise.min(limit),
        (required, _) => required,
    }
}

/// Whether an id has the form of one.
fn is_id(id: &str) -> bool {
    id.parse::<zpod_volume::VolumeId>().is_ok()
}

fn bytes(size: i64) -> Bytes {
    Bytes(size.unsigned_abs())
}
