//! The first process of the guest: loads what is needed to be reached, starts the daemon, and becomes the init that the
//! Kata initrd would have started by itself.
//!
//! # Design
//! `rdinit=/zpod/init` puts us before Kata's `/init`, which stays as it is and finds the machine as it expects it: our
//! mounts of /proc, /sys and /dev are taken away again (lazily: the daemon keeps open what it has open, and the agent
//! mounts its own). It is started only once the daemon listens, so nothing can reach the agent past the proxy.
//! When anything fails before, the machine is powered off: **fail closed**.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::mount::{MountFlags, UnmountFlags};

use crate::daemon::READY;
use crate::kmsg::KernelLog;
use crate::modules::{self, Group};

/// Where everything of ours lies.
pub const ROOT: &str = "/zpod";

/// The inits that are tried: of an initrd, and of an image.
const INITS: [&str; 2] = ["/init", "/sbin/init"];

/// How long the daemon may take to listen.
const DAEMON_WAIT: Duration = Duration::from_secs(30);

/// What is mounted for our own work: type, where, flags.
const MOUNTS: [(&str, &str, MountFlags); 3] = [
    ("proc", "/proc", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC)),
    ("sysfs", "/sys", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC)),
    ("devtmpfs", "/dev", MountFlags::NOSUID),
];

/// Runs as the first process. Does not return: it becomes the next init, or the machine is powered off.
pub fn run(arguments: impl Iterator<Item = OsString>) -> ! {
    let error = match start(arguments) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    let line = format!("the guest can't be started, powering off: {error}");
    match KernelLog::open() {
        Ok(log) => log.line(2, &line),
        Err(_) => eprintln!("zpod-guest: {line}"),
    }
    rustix::fs::sync();
    // The console is slower than the power button.
    std::thread::sleep(Duration::from_millis(200));
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    // The first process must not end.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn start(arguments: impl Iterator<Item = OsString>) -> io::Result<std::convert::Infallible> {
    for (kind, target, flags) in MOUNTS {
        fs::create_dir_all(target)?;
        let mounted = rustix::mount::mount(kind, target, kind, flags, None);
        mounted.map_err(|error| said(&format!("mounting {target}"), error.into()))?;
    }
    modules::load(&Path::new(ROOT).join("modules"), Group::Boot)?;
    start_daemon()?;
    for (_, target, _) in MOUNTS {
        let unmounted = rustix::mount::unmount(target, UnmountFlags::DETACH);
        unmounted.map_err(|error| said(&format!("unmounting {target}"), error.into()))?;
    }
    let arguments: Vec<_> = arguments.collect();
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for init in INITS {
        // Only returns when it fails.
        last = Command::new(init).args(&arguments).exec();
    }
    Err(said(&format!("executing {}", INITS.join(" or ")), last))
}

fn start_daemon() -> io::Result<()> {
    let (mut ready, ours) = io::pipe()?;
    let mut daemon = Command::new(program()?);
    daemon.arg("daemon").stdin(Stdio::null()).stdout(ours);
    daemon.spawn().map_err(|error| said("starting the daemon", error))?;
    // Its end of the pipe is in the command: with that gone, a daemon that dies is an end of file.
    drop(daemon);
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut said = [0; READY.len()];
        let _ = tell.send(ready.read_exact(&mut said).map(|()| said == *READY));
    });
    match told.recv_timeout(DAEMON_WAIT) {
        Ok(Ok(true)) => Ok(()),
        Ok(_) => Err(io::Error::other("the daemon ended before it listened")),
        Err(_) => Err(io::Error::other(format!("the daemon did not listen within {} s", DAEMON_WAIT.as_secs()))),
    }
}

fn program() -> io::Result<OsString> {
    let path = Path::new(ROOT).join("init");
    File::open(&path).map_err(|error| said("opening /zpod/init", error))?;
    Ok(path.into_os_string())
}

fn said(what: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
