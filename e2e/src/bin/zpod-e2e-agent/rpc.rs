//! The agent's ttrpc services: decode, call, encode.

use std::collections::HashMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, anyhow};
use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::Pid;
use prost::Message;
use tokio::sync::{Mutex, oneshot};
use ttrpc::asynchronous::{MethodHandler, Service, TtrpcContext};
use ttrpc::proto::{Request, Response};
use ttrpc::{Code, get_status};
use zpod_e2e::agent::SetGuestDateTimeRequest;
use zpod_proto::agent::{self, volume_usage::Unit};

use crate::process::{Process, Stream};
use crate::sandbox::Sandbox;

const HEALTH: [&str; 2] = ["Check", "Version"];
const AGENT: [&str; 16] = [
    "CreateSandbox",
    "DestroySandbox",
    "CreateContainer",
    "StartContainer",
    "RemoveContainer",
    "ExecProcess",
    "SignalProcess",
    "WaitProcess",
    "ReadStdout",
    "ReadStderr",
    "GetVolumeStats",
    "ResizeVolume",
    "SetGuestDateTime",
    "UpdateInterface",
    "OnlineCPUMem",
    "GetGuestDetails",
];

/// The agent's state and its way to stop.
#[derive(Debug)]
pub(crate) struct Agent {
    sandbox: Mutex<Sandbox>,
    stop: Mutex<Option<oneshot::Sender<()>>>,
}

/// The two services of kata-agent.
pub(crate) fn services(agent: &Arc<Agent>) -> [(String, Service); 2] {
    let service = |methods: &[&'static str]| {
        let methods = methods.iter().map(|&method| {
            let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Handler { agent: Arc::clone(agent), method });
            (method.to_owned(), handler)
        });
        Service { methods: methods.collect(), streams: HashMap::new() }
    };
    [(agent::HEALTH_SERVICE.to_owned(), service(&HEALTH)), (agent::SERVICE.to_owned(), service(&AGENT))]
}

struct Handler {
    agent: Arc<Agent>,
    method: &'static str,
}

#[async_trait]
impl MethodHandler for Handler {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let mut response = Response::new();
        match self.agent.answer(self.method, &request.payload).await {
            Ok(payload) => {
                response.set_status(get_status(Code::OK, ""));
                response.payload = payload;
            }
            Err((code, error)) => {
                println!("agent stand-in: {}: {error:#}", self.method);
                response.set_status(get_status(code, format!("{error:?}")));
            }
        }
        Ok(response)
    }
}

type Answer = Result<Vec<u8>, (Code, anyhow::Error)>;

fn internal(error: anyhow::Error) -> (Code, anyhow::Error) {
    (Code::INTERNAL, error)
}

fn bad(error: anyhow::Error) -> (Code, anyhow::Error) {
    (Code::INVALID_ARGUMENT, error)
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M, (Code, anyhow::Error)> {
    M::decode(payload).context("decode the request").map_err(bad)
}

impl Agent {
    pub(crate) fn new() -> (Self, oneshot::Receiver<()>) {
        let (stop, stopped) = oneshot::channel();
        (Self { sandbox: Mutex::default(), stop: Mutex::new(Some(stop)) }, stopped)
    }

    async fn answer(&self, method: &str, payload: &[u8]) -> Answer {
        match method {
            "Check" => Ok(agent::HealthCheckResponse { status: 1 }.encode_to_vec()),
            "Version" => {
                let (grpc_version, agent_version) = ("0.0.1".to_owned(), "4.1.0-stand-in".to_owned());
                Ok(agent::VersionCheckResponse { grpc_version, agent_version }.encode_to_vec())
            }
            "CreateSandbox" => done(self.sandbox.lock().await.create(decode(payload)?).await),
            "CreateContainer" => done(self.sandbox.lock().await.create_container(decode(payload)?).await),
            "StartContainer" => {
                let request: agent::StartContainerRequest = decode(payload)?;
                let mut sandbox = self.sandbox.lock().await;
                done(sandbox.container(&request.container_id).map_err(internal)?.start().await)
            }
            "RemoveContainer" => {
                let request: agent::RemoveContainerRequest = decode(payload)?;
                done(self.sandbox.lock().await.remove_container(&request.container_id).await)
            }
            "ExecProcess" => done(self.exec(decode(payload)?).await),
            "SignalProcess" => done(self.signal(decode(payload)?).await),
            "WaitProcess" => self.wait(decode(payload)?).await,
            "ReadStdout" => self.read(decode(payload)?, Stream::Stdout).await,
            "ReadStderr" => self.read(decode(payload)?, Stream::Stderr).await,
            "GetVolumeStats" => {
                let request: agent::VolumeStatsRequest = decode(payload)?;
                volume_stats(&request.volume_guest_path).map(|stats| stats.encode_to_vec()).map_err(internal)
            }
            "DestroySandbox" => {
                self.sandbox.lock().await.destroy().await.map_err(internal)?;
                if let Some(stop) = self.stop.lock().await.take() {
                    let _ = stop.send(());
                }
                Ok(Vec::new())
            }
            "SetGuestDateTime" => done(set_clock(&decode(payload)?)),
            "OnlineCPUMem" => Ok(Vec::new()),
            other => Err((Code::UNIMPLEMENTED, anyhow!("{other} is not implemented"))),
        }
    }

    async fn exec(&self, request: agent::ExecProcessRequest) -> Result<()> {
        let process = request.process.ok_or_else(|| anyhow!("Unable to parse process from ExecProcessRequest"))?;
        self.sandbox.lock().await.container(&request.container_id)?.exec(&request.exec_id, process).await
    }

    async fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        self.sandbox.lock().await.container(id)?.process(id, exec_id)
    }

    /// kata-agent: SIGKILL without an exec id means every process of the container.
    async fn signal(&self, request: agent::SignalProcessRequest) -> Result<()> {
        let signal = Signal::try_from(i32::try_from(request.signal)?)?;
        if request.exec_id.is_empty() && signal == Signal::SIGKILL {
            return self.sandbox.lock().await.container(&request.container_id)?.kill_all();
        }
        let process = self.process(&request.container_id, &request.exec_id).await?;
        match kill(Pid::from_raw(i32::try_from(process.pid)?), signal) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    async fn wait(&self, request: agent::WaitProcessRequest) -> Answer {
        let process = self.process(&request.container_id, &request.exec_id).await.map_err(internal)?;
        let status = process.wait().await;
        if let Ok(container) = self.sandbox.lock().await.container(&request.container_id) {
            container.forget(&request.exec_id);
        }
        Ok(agent::WaitProcessResponse { status }.encode_to_vec())
    }

    async fn read(&self, request: agent::ReadStreamRequest, stream: Stream) -> Answer {
        let process = self.process(&request.container_id, &request.exec_id).await.map_err(bad)?;
        let data = process.read(stream, request.len as usize).await.map_err(bad)?;
        Ok(agent::ReadStreamResponse { data }.encode_to_vec())
    }
}

fn done(result: Result<()>) -> Answer {
    result.map(|()| Vec::new()).map_err(internal)
}

fn volume_stats(path: &str) -> Result<agent::VolumeStatsResponse> {
    let stats = nix::sys::statvfs::statvfs(path).with_context(|| format!("statfs {path}"))?;
    let unit = stats.fragment_size();
    let usage = |unit: Unit, total: u64, free: u64| agent::VolumeUsage {
        available: free,
        total,
        used: total - free,
        unit: unit.into(),
    };
    Ok(agent::VolumeStatsResponse {
        usage: vec![
            usage(Unit::Bytes, stats.blocks() * unit, stats.blocks_free() * unit),
            usage(Unit::Inodes, stats.files(), stats.files_free()),
        ],
        volume_condition: Some(agent::VolumeCondition { abnormal: false, message: "OK".to_owned() }),
    })
}

fn set_clock(time: &SetGuestDateTimeRequest) -> Result<()> {
    let time = TimeSpec::new(time.sec, time.usec * 1000);
    clock_settime(ClockId::CLOCK_REALTIME, time).context("set the clock")
}
