//! One block device of two, by device-mapper: what a guest gets for a volume whose halves are on two disks.
//!
//! # Design
//! The device is found by its name in sysfs each time and never remembered, and it is the kernel that says whether a step
//! was done, not the tool. Its table has two `linear` targets, or `error` in the place of a half that is lost: every
//! access to that fails, as on a disk that died.
//!
//! `dmsetup` makes it, from the LVM project. Without udev's rules: nothing on the host is to look at what a guest wrote
//! (`--noudevrules`), and nobody waits for udev, which a container does not have (`--noudevsync`).
//!
//! # Limitations
//! A removal that is deferred until the last user is gone (`--deferred`) can't be taken back: a device that is still in
//! use then keeps its volume from being published again.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use zpod_storage::backing::Outcome;
use zpod_storage::crash;
use zpod_volume::{Bytes, SECTOR, VolumeId};

const TOOLS: [&str; 3] = ["/usr/sbin/dmsetup", "/sbin/dmsetup", "/usr/bin/dmsetup"];
const DRIVER: &str = "/sys/class/misc/device-mapper";
const BLOCK: &str = "/sys/block";
const NODES: &str = "/dev/mapper";
const DEADLINE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);
/// Longest part of what the tool says that is repeated.
const SAID: u64 = 600;

/// Why a device could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum MapperError {
    /// There is no tool.
    #[error("dmsetup is in none of {}; install it (package dmsetup)", TOOLS.join(", "))]
    NoTool,
    /// There is no driver.
    #[error("the kernel has no device-mapper; load it: modprobe dm-mod")]
    NoDriver,
    /// Somebody has it open.
    #[error("device {0} is in use")]
    InUse(PathBuf),
    /// There are no halves.
    #[error("neither half of device {0} can be used")]
    NoHalves(PathBuf),
    /// The tool failed, or did not do it.
    #[error("dmsetup {what} {path}: {text}")]
    Tool {
        /// What was asked of it.
        what: &'static str,
        /// For which device.
        path: PathBuf,
        /// What it said.
        text: String,
    },
    /// The operating system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// When a device goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// At once, if nobody uses it.
    Now,
    /// With its last user.
    WhenUnused,
}

/// Makes devices of two halves.
#[derive(Debug, Clone)]
pub struct Mapper {
    tool: PathBuf,
}

/// A device as the kernel has it.
struct Mapped {
    /// The kernel's name for it, such as `dm-0`.
    name: String,
    sectors: u64,
}

impl Mapper {
    /// Looks for tool and driver.
    ///
    /// # Errors
    /// Where one is missing.
    pub fn open() -> Result<Self, MapperError> {
        let tool = TOOLS.iter().map(Path::new).find(|path| path.is_file()).ok_or(MapperError::NoTool)?;
        if !Path::new(DRIVER).exists() {
            return Err(MapperError::NoDriver);
        }
        Ok(Self { tool: tool.to_owned() })
    }

    /// The path of a volume's device, whether or not it is there.
    pub fn path(id: VolumeId) -> PathBuf {
        Path::new(NODES).join(name_of(id))
    }

    /// Makes the device of two others, the first `half` bytes of each. `None` stands for one that is lost.
    ///
    /// # Errors
    /// Where both are lost, or it can't be made.
    pub fn map(&self, id: VolumeId, halves: [Option<&Path>; 2], half: Bytes) -> Result<Outcome, MapperError> {
        let (path, sectors) = (Self::path(id), half.0 / SECTOR);
        if halves == [None, None] {
            return Err(MapperError::NoHalves(path));
        }
        if let Some(found) = find(id)? {
            if found.sectors == 2 * sectors {
                return name(id, &found);
            }
            // Cut short before it had its table: nobody can have it.
            self.unmap(id, Removal::Now)?;
        }
        let mut table = String::new();
        for (half, start) in halves.iter().zip([0, sectors]) {
            table.push_str(&match half {
                Some(device) => format!("{start} {sectors} linear {} 0\n", device.display()),
                None => format!("{start} {sectors} error\n"),
            });
        }
        let said = self.run(&["create", &name_of(id)], &table)?;
        crash::point("mirror: device mapped");
        match find(id)?.filter(|found| found.sectors == 2 * sectors) {
            Some(found) => name(id, &found).map(|_| Outcome::Changed),
            None => {
                // What was made of it must not stay.
                let _ = self.unmap(id, Removal::Now);
                Err(MapperError::Tool { what: "create", path, text: said })
            }
        }
    }

    /// Removes the device of a volume. One that is not there is no error.
    ///
    /// # Errors
    /// [`MapperError::InUse`] while somebody has it open, where it is to go at once.
    pub fn unmap(&self, id: VolumeId, when: Removal) -> Result<Outcome, MapperError> {
        let path = Self::path(id);
        if find(id)?.is_none() {
            return unname(&path);
        }
        let name = name_of(id);
        let arguments: &[&str] = match when {
            Removal::Now => &["remove", &name],
            Removal::WhenUnused => &["remove", "--deferred", &name],
        };
        let said = self.run(arguments, "")?;
        crash::point("mirror: device unmapped");
        match (find(id)?, when) {
            (None, _) => unname(&path).map(|_| Outcome::Changed),
            (Some(_), Removal::Now) => Err(MapperError::InUse(path)),
            // It goes with its last user.
            (Some(_), Removal::WhenUnused) if said.is_empty() => Ok(Outcome::Changed),
            (Some(_), Removal::WhenUnused) => Err(MapperError::Tool { what: "remove", path, text: said }),
        }
    }

    /// Gives what the tool said where it failed, and nothing where it did not.
    fn run(&self, arguments: &[&str], input: &str) -> Result<String, MapperError> {
        let fail = |source| MapperError::Io { what: "run", path: self.tool.clone(), source };
        let mut command = Command::new(&self.tool);
        command.args(arguments).args(["--noudevsync", "--noudevrules"]).env_clear().env("LC_ALL", "C");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(fail)?;
        if let Some(mut stdin) = child.stdin.take() {
            // Shorter than a pipe: this does not wait. A tool that ends without having read says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        let end = Instant::now() + DEADLINE;
        let status = loop {
            match child.try_wait().map_err(fail)? {
                Some(status) => break status,
                None if Instant::now() >= end => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Ok(format!("not done after {} s, given up", DEADLINE.as_secs()));
                }
                None => std::thread::sleep(LOOK),
            }
        };
        if status.success() {
            return Ok(String::new());
        }
        let mut said = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            // What can't be read is missing from the message.
            let _ = stderr.take(SAID).read_to_end(&mut said);
        }
        Ok(format!("{status}: {}", String::from_utf8_lossy(&said).trim()))
    }
}

fn name_of(id: VolumeId) -> String {
    format!("zpod-{id}")
}

fn find(id: VolumeId) -> Result<Option<Mapped>, MapperError> {
    let wanted = name_of(id);
    let entries = fs::read_dir(BLOCK);
    let entries = entries.map_err(|source| MapperError::Io { what: "read", path: BLOCK.into(), source })?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        // One that goes just now is none any more.
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        if name.starts_with("dm-") && read("dm/name").trim_end() == wanted {
            return Ok(Some(Mapped { name, sectors: read("size").trim().parse().unwrap_or(0) }));
        }
    }
    Ok(None)
}

/// Sees to it that the volume's path leads to the device. The tool makes a node there, where it may (`CAP_MKNOD`); udev,
/// where it is, makes a link to the kernel's node, and so is done here.
fn name(id: VolumeId, device: &Mapped) -> Result<Outcome, MapperError> {
    let (path, node) = (Mapper::path(id), Path::new("/dev").join(&device.name));
    let fail = |what, path: &Path| {
        let path = path.to_owned();
        move |source| MapperError::Io { what, path, source }
    };
    let wanted = fs::metadata(&node).map_err(fail("look at", &node))?;
    let leads = |path: &Path| {
        fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device() && found.rdev() == wanted.rdev())
    };
    if leads(&path) {
        return Ok(Outcome::Unchanged);
    }
    fs::create_dir_all(NODES).map_err(fail("make", Path::new(NODES)))?;
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    symlink(Path::new("..").join(&device.name), &new).map_err(fail("make", &new))?;
    fs::rename(&new, &path).map_err(fail("name", &path))?;
    crash::point("mirror: device named");
    if leads(&path) {
        return Ok(Outcome::Changed);
    }
    Err(fail("find the device at", &path)(io::ErrorKind::NotFound.into()))
}

fn unname(path: &Path) -> Result<Outcome, MapperError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(Outcome::Changed),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(Outcome::Unchanged)
        }
        Err(source) => Err(MapperError::Io { what: "remove", path: path.to_owned(), source }),
    }
}
