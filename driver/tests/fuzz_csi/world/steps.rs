//! What can happen on a node, one step at a time.

use std::time::{Duration, Instant};

use zpod_volume::Create;

use super::{World, is_lost};
use crate::call::{Call, Reply, is_done};
use crate::disk::State;
use crate::machine::{Machine, spec};
use crate::model::{Judged, Sure};
use crate::plan::Step;

/// A guest that reports is heard by then.
const HEARD: Duration = Duration::from_secs(30);

impl World {
    pub(crate) async fn step(&mut self, step: Step) -> Judged {
        match step {
            Step::Call(call) => self.call(call).await?,
            Step::Damaged(call, code) => {
                self.note(format_args!("damaged: {call}"));
                self.counts.calls += 1;
                match call.clone().send(self.channel()).await {
                    answer if self.crashed(&answer) => {}
                    Err(status) if status.code() == code => {}
                    other => return Err(format!("{other:?}, where {code:?} is the answer to {call:?}")),
                }
            }
            Step::AtOnce(calls) => self.at_once(calls).await?,
            Step::Killed(call, after) => {
                self.note(format_args!("killed after {after:?}: {call}"));
                let at_work = tokio::spawn(call.clone().send(self.channel()));
                tokio::time::sleep(after).await;
                let before = self.model.clone();
                self.kill(None);
                let answer = at_work.await.unwrap();
                if is_done(&answer) {
                    // By the process before, which may have known of a guest that this one can't know of.
                    self.model = before;
                    self.judge(&call, &answer)?;
                    self.model.restarted();
                } else {
                    let (call, answer) = self.after_kill(call, answer).await;
                    self.judge(&call, &answer)?;
                    self.take_back(&call, &answer).await?;
                }
            }
            Step::Kill { crash_at } => {
                self.note(format_args!("killed; to be killed at {crash_at:?}"));
                self.kill(crash_at);
            }
            Step::Terminate => {
                self.note("terminated");
                self.terminate();
                self.start(None);
            }
            Step::Start { id, reports } => self.start_machine(&id, reports),
            Step::Hear(id) => self.hear(&id).await?,
            Step::Silence(id) => {
                self.note(format_args!("its guest falls silent: {id}"));
                self.machines.get_mut(&id).unwrap().fall_silent();
                let volume = self.model.volumes.get_mut(&id).unwrap();
                (volume.reports, volume.heard) = (false, Sure::Maybe);
            }
            Step::Stop(id) => self.stop_machine(&id),
            Step::Write { id, place } => {
                self.patterns += 1;
                let pattern = self.patterns;
                self.note(format_args!("writes {pattern} at {place}: {id}"));
                self.machines[&id].write(place, pattern);
                self.model.volumes.get_mut(&id).unwrap().content[place] = pattern;
            }
            Step::Befall(state) => self.befall(state),
        }
        self.check().await
    }

    async fn at_once(&mut self, calls: Vec<Call>) -> Judged {
        for call in &calls {
            self.note(format_args!("at once: {call}"));
        }
        let channel = self.channel();
        let answers = calls.iter().map(|call| tokio::spawn(call.clone().send(channel.clone()))).collect::<Vec<_>>();
        let mut made = Vec::new();
        for (call, answer) in calls.into_iter().zip(answers) {
            made.push((call, answer.await.unwrap()));
        }
        let failed = made.iter().find(|(_, answer)| is_lost(answer)).map(|(_, answer)| answer.clone());
        if self.crashed(&failed.unwrap_or(Ok(Reply::Probe(Default::default())))) {
            for (call, answer) in &mut made {
                if answer.is_err() {
                    *answer = call.clone().complete(self.channel()).await;
                }
            }
        }
        for (_, answer) in &made {
            self.counts.calls += 1;
            self.counts.refused += u64::from(answer.is_err());
            let said = answer.as_ref().map(|_| ()).map_err(|status| (status.code(), status.message()));
            self.trace.push(format!("       {said:?}"));
        }
        let explained = self.model.judge_at_once(&made)?;
        self.take_models(explained);
        for (call, answer) in &made {
            self.take_back(call, answer).await?;
        }
        Ok(())
    }

    fn start_machine(&mut self, id: &str, reports: bool) {
        self.note(format_args!("a machine, reports: {reports}: {id}"));
        self.sandboxes += 1;
        let volume = self.model.volumes.get_mut(id).unwrap();
        let sandbox = format!("sandbox-{}", self.sandboxes);
        self.machines.insert(id.to_owned(), Machine::start(&self.node, id, volume, &sandbox, reports));
        (volume.used, volume.reports) = (true, reports);
        if reports {
            volume.heard = Sure::Maybe;
            if volume.initialized == Sure::No {
                volume.initialized = Sure::Maybe;
            }
        }
    }

    pub(crate) fn stop_machine(&mut self, id: &str) {
        self.note(format_args!("the machine ends: {id}"));
        self.machines.remove(id);
        let volume = self.model.volumes.get_mut(id).unwrap();
        (volume.used, volume.reports) = (false, false);
        if volume.heard == Sure::Yes {
            volume.heard = Sure::Maybe;
        }
    }

    /// Waits until zpod hears the guest of a volume.
    async fn hear(&mut self, id: &str) -> Judged {
        self.note(format_args!("its guest is waited for: {id}"));
        let volume = &self.model.volumes[id];
        let published = volume.published.as_ref().unwrap();
        let name = if volume.ephemeral { volume.name.clone() } else { id.to_owned() };
        let request = zpod_proto::csi::NodeGetVolumeStatsRequest {
            volume_id: name,
            volume_path: published.target.to_str().unwrap().into(),
            ..Default::default()
        };
        let begun = Instant::now();
        loop {
            let Reply::Stats(stats) = self.ask(Call::Stats(request.clone())).await? else { unreachable!() };
            let condition = stats.volume_condition.unwrap_or_default();
            if condition.message == "the pool is healthy" && self.is_recorded(id) {
                let volume = self.model.volumes.get_mut(id).unwrap();
                (volume.heard, volume.initialized) = (Sure::Yes, Sure::Yes);
                return Ok(());
            }
            if begun.elapsed() > HEARD {
                return Err(format!("the guest of {id} is not heard: {condition:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether it is recorded, and said wherever it has to be, that a guest has reported a volume.
    fn is_recorded(&self, id: &str) -> bool {
        let record = std::fs::read(self.node.path("state/volumes").join(format!("{id}.json"))).unwrap_or_default();
        let record = serde_json::from_slice::<serde_json::Value>(&record).unwrap_or_default();
        let volume = &self.model.volumes[id];
        let told = volume.block || spec(&self.node, id, volume).is_some_and(|spec| spec.create == Create::Never);
        record["initialized"] == true && told
    }

    pub(crate) fn befall(&mut self, state: State) {
        self.note(format_args!("the disk: {state:?}"));
        self.counts.full += u64::from(state != State::Free);
        // What has a file open for writing keeps a file system from being remounted.
        let restart = [state, self.model.disk].contains(&State::ReadOnly);
        if restart && let Some(daemon) = self.daemon.take() {
            self.counts.kills += 1;
            daemon.kill();
        }
        self.disk.befall(state);
        (self.model.disk, self.model.offered) = (state, None);
        if restart {
            self.start(None);
        }
    }
}
