//! A node: its directories, and zpod running on them.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::unistd::{Whence, lseek};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use zpod_volume::DiskLayout;

use crate::csi::Csi;
use crate::direct_volume::{self, DirectVolume};
use crate::process::Process;
use crate::workdir::{self, Workdir};
use crate::{console, disk, zpod};

/// Sparse.
const XFS_SIZE: u64 = 16 << 30;

/// A node in a temporary directory. Dropping it ends zpod and removes everything.
#[derive(Debug)]
pub struct Node {
    // Ends before its directory is removed.
    zpod: Option<Process>,
    /// The CSI socket's client.
    pub csi: Csi,
    dir: Workdir,
    /// More arguments of zpod's.
    pub arguments: Vec<String>,
}

impl Node {
    /// A fresh node with zpod running.
    ///
    /// # Errors
    /// When zpod doesn't start.
    pub async fn start() -> Result<Self> {
        let mut node = Self::idle()?;
        node.restart_zpod().await?;
        Ok(node)
    }

    /// The same, with more arguments for zpod.
    ///
    /// # Errors
    /// When zpod doesn't start.
    pub async fn start_with(arguments: &[&str]) -> Result<Self> {
        let mut node = Self::idle()?;
        node.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        node.restart_zpod().await?;
        Ok(node)
    }

    /// The same, whose volumes are on a file system that shares blocks.
    ///
    /// # Errors
    /// When the file system can't be made, or zpod doesn't start.
    pub async fn start_on_xfs_with(arguments: &[&str]) -> Result<Self> {
        let mut node = Self::idle()?;
        node.arguments = arguments.iter().map(|&argument| argument.to_owned()).collect();
        disk::mount_xfs(&node.backing_dir(), XFS_SIZE)?;
        node.restart_zpod().await?;
        Ok(node)
    }

    /// A fresh node without zpod.
    ///
    /// # Errors
    /// When its directories can't be made.
    pub fn idle() -> Result<Self> {
        let dir = Workdir::new()?;
        for name in ["state", "volumes", "direct-volumes", "kata", "pods"] {
            dir.subdirectory(name)?;
        }
        let csi = Csi::new(&dir.path().join("csi.sock"));
        Ok(Self { zpod: None, csi, dir, arguments: Vec::new() })
    }

    /// SIGKILL to zpod, then a new one.
    ///
    /// # Errors
    /// When the new one doesn't start.
    pub async fn restart_zpod(&mut self) -> Result<()> {
        drop(self.zpod.take());
        self.zpod = Some(zpod::start(self.dir.path(), &mut self.csi, &self.arguments).await?);
        Ok(())
    }

    /// Fails when zpod has ended.
    ///
    /// # Errors
    /// See above.
    pub fn zpod_must_run(&mut self) -> Result<()> {
        self.zpod.as_mut().context("zpod was not started")?.must_run()
    }

    /// What zpod answers Prometheus.
    ///
    /// # Errors
    /// When it doesn't.
    pub async fn metrics(&self) -> Result<String> {
        let log = fs::read_to_string(self.dir.path().join("zpod.log")).context("read zpod's log")?;
        let said = log.lines().rev().find(|line| line.contains("metrics are served"));
        let address = said.and_then(|line| line.rsplit_once("address=")).context("zpod serves no metrics")?.1.trim();
        let mut stream = TcpStream::connect(address).await.with_context(|| format!("connect to {address}"))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: zpod\r\nconnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.context("read metrics")?;
        Ok(answer)
    }

    /// The end of zpod's log.
    pub fn log_tail(&self) -> String {
        console::tail(&self.dir.path().join("zpod.log"), 30)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Kata's direct-volume entries.
    pub fn direct_volume_dir(&self) -> PathBuf {
        self.dir.path().join("direct-volumes")
    }

    /// The shims' directory.
    pub fn kata_run_dir(&self) -> PathBuf {
        self.dir.path().join("kata")
    }

    /// The backing files.
    pub fn backing_dir(&self) -> PathBuf {
        self.dir.path().join("volumes")
    }

    /// A pod's target path for a volume, as kubelet makes it: the parent exists, the path itself doesn't.
    ///
    /// # Errors
    /// When its parent can't be made.
    pub fn target(&self, pod: &str, volume: &str) -> Result<PathBuf> {
        let parent = format!("pods/{pod}/volumes/kubernetes.io~csi/{volume}");
        Ok(self.dir.subdirectory(&parent)?.join("mount"))
    }

    /// The device in a target path's direct-volume entry.
    ///
    /// # Errors
    /// When there is no good entry.
    pub fn device(&self, target: &Path) -> Result<PathBuf> {
        Ok(DirectVolume::read(&self.direct_volume_dir(), target)?.device)
    }

    /// Fails unless nothing of a publication is left.
    ///
    /// # Errors
    /// See above.
    pub fn must_be_unpublished(&self, target: &Path) -> Result<()> {
        let entry = direct_volume::entry(&self.direct_volume_dir(), target);
        if entry.exists() {
            bail!("{} is left", entry.display());
        }
        if let Some(mount) = workdir::mounts_below(target).first() {
            bail!("{} is still mounted", mount.display());
        }
        if target.exists() {
            bail!("{} is left", target.display());
        }
        Ok(())
    }

    /// Fails unless no volume and no publication is left anywhere.
    ///
    /// # Errors
    /// See above.
    pub fn must_be_empty(&self) -> Result<()> {
        for dir in [self.backing_dir(), self.direct_volume_dir(), self.kata_run_dir()] {
            let left: Vec<_> = fs::read_dir(&dir)?.flatten().map(|item| item.file_name()).collect();
            let left: Vec<_> = left.iter().filter(|name| !name.to_string_lossy().starts_with('.')).collect();
            if !left.is_empty() {
                bail!("{left:?} is left in {}", dir.display());
            }
        }
        let own = self.backing_dir();
        if let Some(mount) = workdir::mounts_below(self.dir.path()).iter().find(|mount| **mount != own) {
            bail!("{} is still mounted", mount.display());
        }
        Ok(())
    }
}

/// Space a file takes, in bytes.
///
/// # Errors
/// When it can't be looked at.
pub fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// A blank disk in the shape of a volume's: same size, same partition table, nothing else.
///
/// # Errors
/// When it can't be made.
pub fn blank_copy(of: &Path, to: &Path) -> Result<()> {
    let (from, copy) = (File::open(of)?, File::create_new(to)?);
    let size = from.metadata()?.len();
    copy.set_len(size)?;
    // Table and backup table lie outside the journal and the partition.
    for (offset, length) in [(0, 34 * 512), (size - 33 * 512, 33 * 512)] {
        let mut bytes = vec![0; length];
        from.read_exact_at(&mut bytes, offset)?;
        copy.write_all_at(&bytes, offset)?;
    }
    copy.sync_all()?;
    Ok(())
}

/// Whether anything was ever written to the pool's region of a disk or to the guest's journal.
///
/// # Errors
/// When it can't be looked at.
pub fn ever_written(disk: &Path) -> Result<bool> {
    let file = File::open(disk)?;
    let size = file.metadata()?.len();
    let backup = size - (1 << 20);
    let from = i64::try_from(DiskLayout::JOURNAL_OFFSET)?;
    match lseek(&file, from, Whence::SeekData) {
        Ok(offset) => Ok(u64::try_from(offset)? < backup),
        Err(nix::Error::ENXIO) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("seek in {}", disk.display())),
    }
}
