//! The `zpod` binary on directories of its own.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use zpod_volume::VolumeSpec;

/// The directories of one node. They outlive the process that works on them.
pub(crate) struct Node {
    dir: TempDir,
    /// How many times the space may be promised.
    pub(crate) overprovision: f64,
    /// What else it is started with.
    pub(crate) arguments: Vec<&'static str>,
}

/// A running zpod.
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
}

impl Node {
    pub(crate) fn new() -> Self {
        // In memory, where nobody else's files make room come and go. Real file systems are zpod-storage's tests.
        let dir = tempfile::Builder::new().prefix("zpod").tempdir_in("/dev/shm").unwrap();
        let node = Self { dir, overprovision: 20.0, arguments: Vec::new() };
        for name in ["volumes", "pods", "kata"] {
            fs::create_dir(node.path(name)).unwrap();
        }
        node
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(name)
    }

    /// Starts zpod. With `crash_at` it ends at that crash point, perhaps before it serves.
    pub(crate) fn start(&self, crash_at: Option<u64>) -> Daemon {
        self.start_with(crash_at, &[])
    }

    /// Starts it with more in its environment.
    pub(crate) fn start_with(&self, crash_at: Option<u64>, environment: &[(&str, &str)]) -> Daemon {
        let socket = self.path("csi.sock");
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("zpod.log")).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_zpod"));
        command.args(["--standalone", "--node-name", "node-1"]);
        command.arg("--overprovision").arg(self.overprovision.to_string());
        command.args(&self.arguments);
        command.arg("--endpoint").arg(&socket).arg("--admin-endpoint").arg(self.path("admin.sock"));
        for (option, name) in [
            ("--state-dir", "state"),
            ("--backing-dir", "volumes"),
            ("--direct-volume-dir", "direct-volumes"),
            ("--kata-run-dir", "kata"),
            ("--udev-dir", "udev"),
        ] {
            command.arg(option).arg(self.path(name));
        }
        command.env_remove("ZPOD_CRASH_AT").envs(crash_at.map(|at| ("ZPOD_CRASH_AT", at.to_string())));
        command.envs(environment.iter().copied());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(crash_at.is_some() && status.signal() == Some(9), "zpod ended: {status}\n{}", self.log());
                break;
            }
            assert!(Instant::now() < deadline, "zpod does not serve\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        Daemon { child, socket }
    }

    /// The entry Kata finds for a target path.
    pub(crate) fn entry(&self, target: &Path) -> Option<VolumeSpec> {
        let name = URL_SAFE.encode(target.to_str().unwrap());
        let json = fs::read(self.path("direct-volumes").join(name).join("mountInfo.json")).ok()?;
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        Some(VolumeSpec::decode(json["options"][0].as_str().unwrap().strip_prefix("zpod=").unwrap()).unwrap())
    }

    /// The device of a volume.
    pub(crate) fn device(&self, id: &str) -> PathBuf {
        self.path("volumes").join(format!("{id}.img"))
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("zpod.log")).unwrap_or_default()
    }

    /// The names in one of the directories, those that begin with a dot left out.
    pub(crate) fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(dir)).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| !name.starts_with('.')).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // A test that failed may leave a placeholder mounted, on which the directory's removal would fail.
        for name in self.names("pods") {
            let _ = rustix::mount::unmount(self.path("pods").join(name), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

impl Daemon {
    pub(crate) fn channel(&self) -> Channel {
        let socket = self.socket.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        Endpoint::from_static("http://zpod").connect_with_connector_lazy(connector)
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its files in `/proc`.
    pub(crate) fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.child.id())).join(name)
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// `kill -9`.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and how it ended.
    pub(crate) fn terminate(mut self) -> ExitStatus {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap()
    }

    /// Whether it has ended.
    pub(crate) fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Whether it has ended by SIGKILL, waiting a little for it.
    pub(crate) fn crashed(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.signal() == Some(9);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
