//! One node: its disk, zpod, virtual machines, and what happens to them.

#[path = "world/steps.rs"]
mod steps;

use std::collections::BTreeMap;
use std::fmt::Display;

use fastrand::Rng;
use tonic::Code;
use tonic::transport::Channel;
use zpod_proto::csi::NodeUnpublishVolumeRequest;

use crate::call::{Answer, Call, Reply, is_done};
use crate::check::Baseline;
use crate::daemon::{Daemon, Node};
use crate::disk::{Disk, Kind, State};
use crate::machine::Machine;
use crate::model::{Judged, Model};

/// What was done, for a person.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) calls: u64,
    pub(crate) refused: u64,
    pub(crate) kills: u64,
    pub(crate) full: u64,
    pub(crate) episodes: u64,
}

/// What is in memory on a node.
const IN_MEMORY: [&str; 2] = ["direct-volumes", "pods"];

pub(crate) struct World {
    // Dropped in this order: what has files open first.
    machines: BTreeMap<String, Machine>,
    daemon: Option<Daemon>,
    channel: Option<Channel>,
    pub(crate) disk: Disk,
    pub(crate) node: Node,
    pub(crate) model: Model,
    /// Others that explain the answers as well, until one is seen to be right.
    others: Vec<Model>,
    pub(crate) random: Rng,
    pub(crate) baseline: Baseline,
    /// What GetCapacity offered at the beginning.
    pub(crate) room_at_first: i64,
    pub(crate) counts: Counts,
    /// It is to be killed at a crash point that it may reach at any time.
    armed: bool,
    sandboxes: u64,
    patterns: u64,
    trace: Vec<String>,
}

/// Whether there was nobody any more to answer.
fn is_lost(answer: &Answer) -> bool {
    answer.as_ref().is_err_and(|status| {
        std::error::Error::source(status).is_some() || status.message().contains("h2 protocol error")
    })
}

impl World {
    pub(crate) async fn new(seed: u64, kind: Kind, records_on_disk: bool, overprovision: f64) -> Self {
        let mut node = Node::new();
        node.overprovision = overprovision;
        node.arguments = vec!["--ephemeral-pod-size=100%", "--ephemeral-namespace-size=100%"];
        let disk = Disk::mount(kind, &node.path("disk"));
        disk.directory_at(&node.path("volumes"), false);
        if records_on_disk {
            disk.directory_at(&node.path("state"), false);
        }
        for name in IN_MEMORY {
            disk.directory_at(&node.path(name), true);
        }
        std::os::unix::fs::symlink(node.path("pods"), node.path("pods-by-another-name")).unwrap();
        let mut world = Self {
            machines: BTreeMap::new(),
            daemon: None,
            channel: None,
            model: Model::new(disk.shares(), overprovision),
            others: Vec::new(),
            disk,
            node,
            random: Rng::with_seed(seed),
            baseline: Baseline::default(),
            room_at_first: 0,
            counts: Counts { episodes: 1, ..Counts::default() },
            armed: false,
            sandboxes: 0,
            patterns: 0,
            trace: vec![format!(
                "{kind:?}, records on the same disk: {records_on_disk}, promised {overprovision} times"
            )],
        };
        world.start(None);
        world.baseline = Baseline::of(&world);
        match world.check().await {
            Ok(()) => world.room_at_first = world.model.offered.unwrap_or_default(),
            Err(wrong) => world.violation(&wrong),
        }
        world
    }

    pub(crate) fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    pub(crate) fn note(&mut self, what: impl Display) {
        self.trace.push(format!("{:3}  {what}", self.trace.len()));
    }

    /// Ends the test.
    pub(crate) fn violation(&self, what: &str) -> ! {
        let from = self.trace.len().saturating_sub(30);
        let log = self.node.log();
        let log = log.lines().rev().take(12).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>();
        panic!("{}\n... and zpod said:\n{}\n\nVIOLATION: {what}", self.trace[from..].join("\n"), log.join("\n"));
    }

    fn start(&mut self, crash_at: Option<u64>) {
        let daemon = self.node.start(crash_at);
        (self.channel, self.daemon, self.armed) = (Some(daemon.channel()), Some(daemon), crash_at.is_some());
        self.model.restarted();
    }

    fn channel(&self) -> Channel {
        self.channel.clone().unwrap()
    }

    /// SIGKILL, and another process.
    pub(crate) fn kill(&mut self, crash_at: Option<u64>) {
        self.counts.kills += 1;
        if let Some(daemon) = self.daemon.take() {
            daemon.kill();
        }
        self.start(crash_at);
    }

    /// Whether zpod was killed at a crash point. Then it runs again.
    fn crashed(&mut self, answer: &Answer) -> bool {
        let transport = is_lost(answer);
        let daemon = self.daemon.as_mut().unwrap();
        let ended = if transport && self.armed { daemon.crashed() } else { daemon.ended() };
        if !ended {
            return false;
        }
        if !self.armed {
            self.violation("zpod has ended");
        }
        self.note("killed at a crash point");
        self.kill(None);
        true
    }

    /// A question that has an answer whatever was done before.
    pub(crate) async fn ask(&mut self, call: Call) -> Result<Reply, String> {
        loop {
            let answer = call.clone().send(self.channel()).await;
            if !self.crashed(&answer) {
                return answer.map_err(|status| format!("{call:?}: {status:?}"));
            }
        }
    }

    /// Makes a call to its end, across kills, and judges what came of it.
    pub(crate) async fn call(&mut self, call: Call) -> Judged {
        self.note(&call);
        let answer = call.clone().complete(self.channel()).await;
        let (call, answer) = if self.crashed(&answer) { self.after_kill(call, answer).await } else { (call, answer) };
        self.judge(&call, &answer)?;
        self.take_back(&call, &answer).await
    }

    /// A publication that may stand though the call failed is taken back, as kubelet does: whatever was in its way must not
    /// be in the way of that.
    pub(crate) async fn take_back(&mut self, call: &Call, answer: &Answer) -> Judged {
        let (Call::Publish(request), Err(status)) = (call, answer) else { return Ok(()) };
        // Of what stands, only the path would go while its record can't be written: the plan takes nothing back then either.
        let stuck = self.model.disk == State::ReadOnly && self.model.stands(request);
        if status.code() != Code::Unavailable || stuck {
            return Ok(());
        }
        let (volume_id, target_path) = (request.volume_id.clone(), request.target_path.clone());
        let unpublish = Call::Unpublish(NodeUnpublishVolumeRequest { volume_id, target_path });
        self.note(format_args!("  then {unpublish}"));
        loop {
            let answer = unpublish.clone().complete(self.channel()).await;
            if !self.crashed(&answer) {
                return self.judge(&unpublish, &answer);
            }
        }
    }

    /// What was done when the call was cut short is not known: it is repeated, or given up.
    async fn after_kill(&mut self, call: Call, answer: Answer) -> (Call, Answer) {
        if is_done(&answer) {
            return (call, answer);
        }
        let given_up = self.random.u8(0..3) == 0;
        let other = call.given_up(|name| self.model.id_of(name), |name| self.model.snapshot_id_of(name));
        let call = other.filter(|_| given_up).unwrap_or(call);
        self.note(format_args!("  then {call}"));
        let answer = call.clone().complete(self.channel()).await;
        (call, answer)
    }

    pub(crate) fn judge(&mut self, call: &Call, answer: &Answer) -> Judged {
        self.counts.calls += 1;
        if let Err(status) = answer {
            self.counts.refused += 1;
            self.note(format_args!("  {:?}: {}", status.code(), status.message()));
        }
        let judged = self.model.judge(call, answer);
        self.others.retain_mut(|other| other.judge(call, answer).is_ok());
        if judged.is_err() && self.try_next_model() { Ok(()) } else { judged }
    }

    /// Takes one of these, which all explain what was answered.
    fn take_models(&mut self, explained: Vec<Model>) {
        self.others = explained;
        self.try_next_model();
    }

    /// Takes another one instead of one that was wrong. Whether there was one.
    pub(crate) fn try_next_model(&mut self) -> bool {
        if self.others.is_empty() {
            return false;
        }
        self.model = self.others.remove(0);
        true
    }

    /// The model is right.
    pub(crate) fn settle_model(&mut self) {
        self.others.clear();
    }

    /// SIGTERM, on which it ends well.
    pub(crate) fn terminate(&mut self) {
        let status = self.daemon.take().unwrap().terminate();
        if !status.success() && !self.armed {
            self.violation(&format!("told to end, it ended with {status}"));
        }
    }

    /// Everything that runs on a machine ends with it.
    pub(crate) fn stop_all(&mut self) {
        for id in self.machines.keys().cloned().collect::<Vec<_>>() {
            self.stop_machine(&id);
        }
    }

    /// Once zpod has ended, nobody has a file of the disk.
    pub(crate) fn nobody_has_the_disk(&self) -> Judged {
        for name in ["volumes", "state"] {
            // Where it is none, it is no mount of its own.
            let _ = rustix::mount::unmount(self.node.path(name), rustix::mount::UnmountFlags::empty());
        }
        self.disk.unmount().map_err(|error| format!("somebody still has files of the disk: {error}"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.machines.clear();
        self.daemon = None;
        for name in ["volumes", "state"].into_iter().chain(IN_MEMORY) {
            let _ = rustix::mount::unmount(self.node.path(name), rustix::mount::UnmountFlags::DETACH);
        }
    }
}
