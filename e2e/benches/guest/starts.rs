//! Containers that start and go.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use zpod_e2e::report::{Table, median};
use zpod_e2e::{Container, Mount, Sandbox};

use crate::volume::{Kind, Volume};

const SAID: Duration = Duration::from_secs(10);

/// Whether there is a file system on the volume's disk. ext4 always has one: it is made on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum State {
    Fresh,
    Existing,
}

/// Milliseconds of one container.
#[derive(Debug)]
struct Start {
    /// CreateContainer, from the shim's request to the answer.
    create: f64,
    /// Of it, from its receipt by zpod-guest until it was passed on to the agent.
    ready: Option<f64>,
    /// Of that, the stages.
    stages: Vec<(String, f64)>,
    /// Disk plugged in, container created and started.
    run: f64,
    /// Container killed and removed, disk unplugged.
    remove: f64,
}

/// What containers are told apart by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Case {
    kind: Option<Kind>,
    state: State,
    /// No other container of this guest had such a volume before: for ZFS, its modules are loaded first.
    first: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Starts {
    runs: BTreeMap<Case, Vec<Start>>,
    seen: BTreeSet<Option<Kind>>,
    containers: usize,
}

impl Starts {
    /// Another guest from now on.
    pub(crate) fn new_guest(&mut self) {
        self.seen.clear();
    }

    pub(crate) async fn each(&mut self, pod: &mut Sandbox, volumes: &[Volume], state: State) -> Result<()> {
        for volume in volumes {
            self.measure(pod, Some(volume), state).await?;
        }
        Ok(())
    }

    pub(crate) async fn measure(&mut self, pod: &mut Sandbox, volume: Option<&Volume>, state: State) -> Result<()> {
        self.containers += 1;
        let id = format!("c{}", self.containers);
        let kind = volume.map(|volume| volume.kind);
        let mounts = volume.map(|volume| Mount::new(&volume.target, "/data"));
        let begun = Instant::now();
        pod.run(Container::new(&id, mounts)).await?;
        let (create, run) = (millis(pod.create_time), millis(begun.elapsed()));
        if let Some(Volume { kind, name, .. }) = volume {
            let mounted = pod.sh(&id, "awk '$2==\"/data\"{print $3}' /proc/mounts").await?;
            anyhow::ensure!(mounted == kind.name(), "{name} is mounted as {mounted:?}");
            let script = match state {
                State::Fresh => format!("echo {name} > /data/name && sync"),
                State::Existing => format!("grep -qx {name} /data/name"),
            };
            pod.sh(&id, &script).await?;
        }
        let (ready, stages) = if kind == Some(Kind::Zfs) {
            said(pod, &id).await.map(|(ready, stages)| (Some(ready), stages))?
        } else {
            (None, Vec::new())
        };
        let begun = Instant::now();
        pod.remove(&id).await?;
        let start = Start { create, ready, stages, run, remove: millis(begun.elapsed()) };
        let case = Case { kind, state, first: self.seen.insert(kind) };
        self.runs.entry(case).or_default().push(start);
        Ok(())
    }

    pub(crate) fn print(&self, title: impl Fn(&str) -> String) {
        let head = ["", "runs", "CreateContainer", "least - most", "of it zpod's", "plug to started", "removed"];
        let mut table = Table::new(&title("a container's start and end, medians in ms"), &head);
        for (case, starts) in &self.runs {
            let of = |what: fn(&Start) -> f64| starts.iter().map(what).collect::<Vec<_>>();
            let creates = of(|start| start.create);
            let most = creates.iter().copied().fold(0.0, f64::max);
            let ready: Vec<_> = starts.iter().filter_map(|start| start.ready).collect();
            table.row(vec![
                case.name(),
                starts.len().to_string(),
                format!("{:.0}", median(&creates)),
                format!("{:.0} - {most:.0}", creates.iter().copied().fold(most, f64::min)),
                if ready.is_empty() { "-".into() } else { format!("{:.0}", median(&ready)) },
                format!("{:.0}", median(&of(|start| start.run))),
                format!("{:.0}", median(&of(|start| start.remove))),
            ]);
        }
        table.print();
        let cases = [(State::Fresh, true), (State::Existing, true), (State::Fresh, false), (State::Existing, false)];
        let head = ["", "fresh, first", "existing, first", "fresh", "existing"];
        let mut table = Table::new(&title("the parts of zpod's time, medians in ms"), &head);
        for stage in self.stages() {
            let cells = cases.map(|(state, first)| {
                let values = self.stage(&stage, Case { kind: Some(Kind::Zfs), state, first });
                if values.is_empty() { "-".to_owned() } else { format!("{:.0}", median(&values)) }
            });
            table.row([vec![stage], cells.to_vec()].concat());
        }
        table.print();
    }

    pub(crate) fn json(&self) -> Value {
        let rows = self.runs.iter().map(|(case, starts)| {
            let of = |what: fn(&Start) -> f64| starts.iter().map(what).collect::<Vec<_>>();
            let has_pool = case.kind == Some(Kind::Zfs);
            let stages = self.stages().into_iter().filter(|_| has_pool);
            let stages: BTreeMap<_, _> = stages.map(|stage| (stage.clone(), self.stage(&stage, *case))).collect();
            json!({
                "volume": case.kind.map(Kind::name),
                "existing": case.state == State::Existing,
                "firstInGuest": case.first,
                "createContainerMillis": of(|start| start.create),
                "readyMillis": starts.iter().filter_map(|start| start.ready).collect::<Vec<_>>(),
                "stageMillis": stages,
                "runMillis": of(|start| start.run),
                "removeMillis": of(|start| start.remove),
            })
        });
        Value::Array(rows.collect())
    }

    /// Their names, in the order in which they were first seen.
    fn stages(&self) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for (name, _) in self.runs.values().flatten().flat_map(|start| &start.stages) {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        names
    }

    /// One that took less than a millisecond is left out by zpod-guest, and is zero here.
    fn stage(&self, name: &str, case: Case) -> Vec<f64> {
        let starts = self.runs.get(&case).into_iter().flatten();
        let of = |start: &Start| start.stages.iter().find(|(stage, _)| stage == name).map_or(0.0, |(_, time)| *time);
        starts.map(of).collect()
    }
}

impl Case {
    fn name(self) -> String {
        let Some(kind) = self.kind else { return "no volume".to_owned() };
        let state = if self.state == State::Fresh { "fresh" } else { "existing" };
        format!("{}, {state}{}", kind.name(), if self.first { ", first in its guest" } else { "" })
    }
}

fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e5).round() / 100.0
}

/// What zpod-guest said of a container on the console: when its volume was ready, and the stages before.
async fn said(pod: &Sandbox, container: &str) -> Result<(f64, Vec<(String, f64)>)> {
    let end = format!("container={container}\r");
    pod.guest().shows(&end, SAID).await?;
    let console = pod.guest().console_tail(200);
    let lines = || console.lines().rev();
    let end = end.trim_end();
    let ready = lines().find_map(|line| {
        let (_, rest) = line.strip_suffix(end)?.split_once(" volumes ready after ")?;
        rest.trim_end().strip_suffix(" ms")?.parse().ok()
    });
    let stages = lines().find_map(|line| line.split_once("pool up: ")?.1.split_once(" volume="));
    let (stages, _) = stages.context("zpod-guest doesn't say what the pool took")?;
    let stages = stages.split(", ").filter_map(|stage| {
        let (name, time) = stage.strip_suffix(" ms")?.rsplit_once(' ')?;
        Some((name.to_owned(), time.parse().ok()?))
    });
    Ok((ready.context("zpod-guest doesn't say when the volume was ready")?, stages.collect()))
}
