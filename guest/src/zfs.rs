//! The ZFS tools: the one module that runs `zpool` and `zfs`.
//!
//! # Design
//! Always an argv, never a shell; a deadline for each command and a bound for its output. Answers are read as JSON
//! (`-j`, OpenZFS 2.3), with plain numbers (`-p`). The tools come with their own libraries and loader, since Kata's
//! initrd may have another C library, or none.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;
use zpod_volume::{Bytes, DiskLayout, Encryption, PoolName, Property, PropertyKind};

use crate::key::Key;
use crate::machine::{Child, Fault, Grantee, PoolReport, PoolState, Properties, Scrub};

mod json;
pub mod label;
mod rollback;
mod stream;

/// What most commands get. They take a fraction of a second, some seconds under emulation.
const DEADLINE: Duration = Duration::from_secs(30);
/// An import reads the whole of a pool's metadata that is in use, after a crash also what was lost of it.
const IMPORT_DEADLINE: Duration = Duration::from_secs(600);
/// A passphrase is hashed 350,000 times (`pbkdf2iters`), which takes a while under emulation.
const KEY_DEADLINE: Duration = Duration::from_secs(120);
/// Longest output that is read.
const OUTPUT: u64 = 8 << 20;
/// Longest part of an error output that is repeated.
const ERROR_TEXT: usize = 600;

/// Properties of every pool. `cachefile=none`: nothing in the guest outlives it. `failmode=continue`: when the disk is
/// lost, writes fail with EIO; with `wait` the container's processes would hang where no signal ends them, and the pod
/// with them (zpoolprops(7)).
const POOL: [&str; 4] = ["-o", "cachefile=none", "-o", "failmode=continue"];

/// The name of the set of rights that containers are given.
const SET: &str = "@zpod";

/// What containers may do with a volume's dataset and with what they make below it, without CAP_SYS_ADMIN: what needs no
/// mount, and the properties that are theirs to choose. `mount` is asked for by `create`, `clone`, `destroy`, `receive` and
/// `rename` (zfs-allow(8)), and mounts nothing without the capability. Not among them is what would change who may do what
/// (`allow`, `zoned`), what files may do (`exec`, `setuid`, `devices`), and the key (`change-key`), which is the node's.
const RIGHTS: [&str; 34] = [
    "bookmark",
    "clone",
    "create",
    "destroy",
    "diff",
    "hold",
    "mount",
    "promote",
    "receive",
    "release",
    "rename",
    "rollback",
    "send",
    "snapshot",
    "userprop",
    "acltype",
    "atime",
    "canmount",
    "checksum",
    "compression",
    "copies",
    "dedup",
    "logbias",
    "mountpoint",
    "primarycache",
    "quota",
    "recordsize",
    "refquota",
    "refreservation",
    "reservation",
    "snapdir",
    "sync",
    "volsize",
    "xattr",
];

/// The loader among the libraries of the tools, where they have their own.
pub fn loader(libraries: &Path) -> Option<PathBuf> {
    let names = ["ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "ld64.so.2", "ld64.so.1"];
    names.into_iter().map(|name| libraries.join(name)).find(|path| path.exists())
}

/// The tools and how they are run.
#[derive(Debug, Clone)]
pub struct Tools {
    /// Dynamic loader and libraries to run them with; `None` runs them as they are.
    loader: Option<(PathBuf, PathBuf)>,
    directory: PathBuf,
}

impl Tools {
    /// The tools of the guest image, below `root` (`/zpod`).
    pub fn below(root: &Path) -> Self {
        let libraries = root.join("lib");
        Self { loader: loader(&libraries).map(|loader| (loader, libraries)), directory: root.join("bin") }
    }

    async fn run<S: AsRef<OsStr>>(&self, tool: &str, arguments: &[S], deadline: Duration) -> Result<Vec<u8>, Fault> {
        self.run_with(tool, arguments, None, deadline).await
    }

    fn command<S: AsRef<OsStr>>(&self, tool: &str, arguments: &[S]) -> Command {
        let program = self.directory.join(tool);
        let mut command = match &self.loader {
            Some((loader, libraries)) => {
                let mut command = Command::new(loader);
                command.arg("--library-path").arg(libraries).arg(&program);
                command
            }
            None => Command::new(&program),
        };
        command.args(arguments).env_clear().env("LC_ALL", "C").env("PATH", &self.directory);
        // Device ids come from udev, which is not here: an import would wait 3 s for them (measured: 3.5 s, else 0.4 s).
        command.env("ZFS_VDEV_DEVID_OPT_OUT", "YES");
        command
    }

    /// The same with something to read on the standard input. That is never part of an error.
    async fn run_with<S: AsRef<OsStr>>(
        &self,
        tool: &str,
        arguments: &[S],
        input: Option<&[u8]>,
        deadline: Duration,
    ) -> Result<Vec<u8>, Fault> {
        let mut command = self.command(tool, arguments);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let name = || {
            let arguments: Vec<_> = arguments.iter().map(|argument| argument.as_ref().to_string_lossy()).collect();
            format!("{tool} {}", arguments.join(" "))
        };
        let mut child = command.spawn().map_err(|error| Fault::new(format!("{}: {error}", name())))?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let fed = async {
            if let (Some(mut stdin), Some(input)) = (stdin, input) {
                // A tool that ends without having read says why.
                let _ = stdin.write_all(input).await;
            }
        };
        let work = async { tokio::join!(fed, bounded(stdout), bounded(stderr), child.wait()) };
        let Ok(((), stdout, stderr, status)) = tokio::time::timeout(deadline, work).await else {
            let text = format!("{}: not done after {} s, given up", name(), deadline.as_secs());
            return Err(Fault { given_up: true, ..Fault::new(text) });
        };
        let status = status.map_err(|error| Fault::new(format!("{}: {error}", name())))?;
        if status.success() {
            return Ok(stdout);
        }
        let text = plain(&stderr);
        Err(Fault { busy: text.contains("busy"), ..Fault::new(format!("{}: {status}: {text}", name())) })
    }

    async fn zpool<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Vec<u8>, Fault> {
        self.run("zpool", arguments, DEADLINE).await
    }

    /// What a pool says of itself.
    ///
    /// # Errors
    /// When it is not imported or the tool fails; so for all of these calls.
    pub async fn pool(&self, pool: &PoolName) -> Result<PoolState, Fault> {
        let columns: Vec<_> = ["name", "expandsize"].into_iter().chain(keys(PropertyKind::Pool)).collect();
        let output = self.zpool(&["list", "-j", "-p", "-o", &columns.join(","), pool.as_str()]).await?;
        json::pool(&output, pool)
    }

    /// How a pool fares.
    pub async fn report(&self, pool: &PoolName) -> Result<PoolReport, Fault> {
        json::report(&self.zpool(&["status", "-j", "-p", pool.as_str()]).await?, pool)
    }

    /// Imports the pool that has the name `found` on these devices, as `pool`. `-f`: another virtual machine had it, with
    /// another hostid; that it is gone is the node's to prove (DESIGN: one kernel at a time). `-N`: nothing is mounted.
    pub async fn import(
        &self,
        found: &PoolName,
        pool: &PoolName,
        devices: &[PathBuf],
        read_only: bool,
    ) -> Result<(), Fault> {
        let mut arguments: Vec<&OsStr> = vec!["import".as_ref()];
        arguments.extend(devices.iter().flat_map(|device| ["-d".as_ref(), device.as_os_str()]));
        let renamed = (found != pool).then_some(pool.as_str());
        let read_only: &[&str] = if read_only { &["-o", "readonly=on"] } else { &[] };
        let options = ["-N", "-f"].into_iter().chain(POOL).chain(read_only.iter().copied());
        arguments.extend(options.chain([found.as_str()]).chain(renamed).map(OsStr::new));
        self.run("zpool", &arguments, IMPORT_DEADLINE).await.map(drop)
    }

    /// Gives a pool a new GUID, at random; it is in the labels when this returns.
    pub async fn reguid(&self, pool: &PoolName) -> Result<(), Fault> {
        self.zpool(&["reguid", pool.as_str()]).await.map(drop)
    }

    /// Gives up the state of a pool that was kept for a way back, and waits until that is done.
    pub async fn discard_checkpoint(&self, pool: &PoolName) -> Result<(), Fault> {
        self.run("zpool", &["checkpoint", "-d", "-w", pool.as_str()], IMPORT_DEADLINE).await.map(drop)
    }

    /// Makes a pool on one device, or a mirror of more, with nothing mounted.
    pub async fn create_pool(
        &self,
        pool: &PoolName,
        devices: &[PathBuf],
        properties: &[(String, String)],
        force: bool,
    ) -> Result<(), Fault> {
        let settings = settings(properties);
        let mut arguments = vec!["create"];
        arguments.extend(force.then_some("-f"));
        arguments.extend(POOL);
        arguments.extend(settings.iter().flat_map(|setting| ["-o", setting]));
        arguments.extend(["-O", "mountpoint=none", "-O", "canmount=off", pool.as_str()]);
        arguments.extend((devices.len() > 1).then_some("mirror"));
        let mut arguments: Vec<&OsStr> = arguments.into_iter().map(OsStr::new).collect();
        arguments.extend(devices.iter().map(|device| device.as_os_str()));
        self.run("zpool", &arguments, IMPORT_DEADLINE).await.map(drop)
    }

    /// Makes a dataset that is mounted by mount(2) only, or a sparse block device (zvol) of a size. `volmode=dev`: the
    /// kernel doesn't look for partitions in what a container has written there.
    pub async fn create_dataset(
        &self,
        dataset: &str,
        size: Option<Bytes>,
        properties: &[(String, String)],
        encryption: Option<(Encryption, &Key)>,
    ) -> Result<(), Fault> {
        let (mut settings, size) = (settings(properties), size.map(|size| whole_blocks(size).to_string()));
        if let Some((cipher, key)) = encryption {
            settings.push(format!("encryption={}", cipher.as_str()));
            settings.extend(key_properties(key));
        }
        let mut arguments = match &size {
            None => vec!["create", "-o", "mountpoint=legacy"],
            Some(size) => vec!["create", "-s", "-V", size.as_str(), "-o", "volmode=dev"],
        };
        arguments.extend(settings.iter().flat_map(|setting| ["-o", setting]));
        arguments.push(dataset);
        let input = encryption.map(|(_, key)| key.input());
        self.run_with("zfs", &arguments, input.as_ref().map(|input| input.as_slice()), KEY_DEADLINE).await.map(drop)
    }

    /// Loads the key of a dataset, or looks only whether it would fit (`-n`), which can be done while it is loaded. False
    /// where it does not fit.
    pub async fn load_key(&self, dataset: &str, key: &Key, only_look: bool) -> Result<bool, Fault> {
        // Whatever its owner has made of `keylocation`: the key is what the node provides, and no file of the guest's.
        let arguments: Vec<_> =
            ["load-key", "-L", "prompt"].into_iter().chain(only_look.then_some("-n")).chain([dataset]).collect();
        match self.run_with("zfs", &arguments, Some(&key.input()), KEY_DEADLINE).await {
            Ok(_) => Ok(true),
            Err(fault) if fault.text.contains("Incorrect key provided") => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Gives a dataset whose key is loaded another one. What is encrypted with it is the key of the contents, which
    /// stays.
    pub async fn change_key(&self, dataset: &str, key: &Key) -> Result<(), Fault> {
        let settings = key_properties(key);
        let mut arguments = vec!["change-key"];
        arguments.extend(settings.iter().flat_map(|setting| ["-o", setting]));
        arguments.push(dataset);
        self.run_with("zfs", &arguments, Some(&key.input()), KEY_DEADLINE).await.map(drop)
    }

    /// Properties of a dataset right below its pool; `None` when there is none.
    pub async fn dataset(&self, dataset: &str) -> Result<Option<Properties>, Fault> {
        let more = [
            "type",
            "encryption",
            "keyformat",
            "keystatus",
            "quota",
            "refquota",
            "refreservation",
            "volsize",
            "used",
            "referenced",
            "available",
            "compressratio",
            "readonly",
            "usedbysnapshots",
            "usedbychildren",
            "usedbydataset",
            "snapshots_changed",
        ];
        let keys: Vec<_> = more.into_iter().chain(keys(PropertyKind::Dataset)).collect();
        // None of them is of the tenant's own words: the tools write JSON of the plainest texts only.
        let arguments = ["get", "-j", "-p", "-t", "filesystem,volume", &keys.join(","), dataset];
        match self.run("zfs", &arguments, DEADLINE).await {
            Err(fault) if fault.text.contains("dataset does not exist") => {
                // Where it is the pool that is missing, nothing is known of its datasets.
                let pool = dataset.split('/').next().unwrap_or_default();
                self.run("zfs", &["list", "-H", "-o", "name", pool], DEADLINE).await.map(|_| None)
            }
            output => json::dataset(&output?, dataset),
        }
    }

    /// What is noted in a property of the pool's own dataset, over which nobody in a container has rights without
    /// CAP_SYS_ADMIN. Not as JSON, which could not have every text.
    pub async fn noted(&self, pool: &PoolName, property: &str) -> Result<String, Fault> {
        let arguments = ["get", "-H", "-p", "-o", "value", "-s", "local", property, pool.as_str()];
        let output = self.run("zfs", &arguments, DEADLINE).await?;
        Ok(String::from_utf8_lossy(&output).trim_end_matches('\n').to_owned())
    }

    /// Sets properties of a dataset.
    pub async fn set_dataset(&self, dataset: &str, properties: &[(String, String)]) -> Result<(), Fault> {
        let settings = settings(properties);
        let mut arguments = vec!["set"];
        arguments.extend(settings.iter().map(String::as_str));
        arguments.push(dataset);
        self.run("zfs", &arguments, DEADLINE).await.map(drop)
    }

    /// The file systems below a dataset, by name: each behind the one it is in.
    pub async fn children(&self, dataset: &str) -> Result<Vec<Child>, Fault> {
        let arguments = ["list", "-j", "-p", "-r", "-t", "filesystem", "-o", "name,canmount", dataset];
        json::children(&self.run("zfs", &arguments, DEADLINE).await?, dataset)
    }

    /// Gives somebody [`RIGHTS`] over a dataset and all below it, as a set by a name of ours, or takes them away.
    pub async fn allow(&self, dataset: &str, grantee: Grantee, allowed: bool) -> Result<(), Fault> {
        let group;
        let (kind, who) = match grantee {
            Grantee::Root => ("-u", "0"),
            Grantee::Group(number) => {
                group = number.to_string();
                ("-g", group.as_str())
            }
        };
        if !allowed {
            return self.run("zfs", &["unallow", kind, who, SET, dataset], DEADLINE).await.map(drop);
        }
        self.run("zfs", &["allow", "-s", SET, &RIGHTS.join(","), dataset], DEADLINE).await?;
        self.run("zfs", &["allow", kind, who, SET, dataset], DEADLINE).await.map(drop)
    }

    /// Sets a property of a pool.
    pub async fn set_pool(&self, pool: &PoolName, key: &str, value: &str) -> Result<(), Fault> {
        self.zpool(&["set", &format!("{key}={value}"), pool.as_str()]).await.map(drop)
    }

    /// Every property of a pool's dataset and of the pool.
    pub async fn properties(&self, pool: &PoolName, dataset: &str) -> Result<(Properties, Properties), Fault> {
        let dataset_output = self.run("zfs", &["get", "-j", "-p", "all", dataset], DEADLINE).await?;
        let found = json::dataset(&dataset_output, dataset)?;
        let found = found.ok_or_else(|| Fault::new(format!("there is no dataset {dataset}")))?;
        let pool = json::pool(&self.zpool(&["get", "-j", "-p", "all", pool.as_str()]).await?, pool)?;
        Ok((found, pool.properties))
    }

    /// The snapshots of a dataset: what stands behind the `@`, sorted by name.
    pub async fn snapshots(&self, dataset: &str) -> Result<Vec<String>, Fault> {
        let arguments = ["list", "-j", "-p", "-t", "snapshot", "-d", "1", "-o", "name", dataset];
        json::snapshots(&self.run("zfs", &arguments, DEADLINE).await?, dataset)
    }

    /// Takes a snapshot of a dataset; it is on the disk when this returns. One: ZFS takes no two of a dataset at once.
    pub async fn snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        self.run("zfs", &["snapshot", &format!("{dataset}@{name}")], DEADLINE).await.map(drop)
    }

    /// Bytes of what was destroyed that the pool has not freed yet.
    pub async fn freeing(&self, pool: &PoolName) -> Result<u64, Fault> {
        let output = self.zpool(&["get", "-H", "-p", "-o", "value", "freeing", pool.as_str()]).await?;
        String::from_utf8_lossy(&output).trim().parse().map_err(|_| Fault::new("zpool get freeing is no number"))
    }

    /// Bytes that would be free if these snapshots were destroyed together. `-n`: nothing is.
    pub async fn reclaimable(&self, dataset: &str, names: &[&str]) -> Result<u64, Fault> {
        let snapshots = format!("{dataset}@{}", names.join(","));
        let output = self.run("zfs", &["destroy", "-n", "-v", "-p", &snapshots], DEADLINE).await?;
        let text = String::from_utf8_lossy(&output);
        let bytes = text.lines().find_map(|line| line.strip_prefix("reclaim\t")?.parse().ok());
        bytes.ok_or_else(|| Fault::new("zfs destroy -n does not say what would be free"))
    }

    /// Destroys a snapshot. What it alone held is given back later, by ZFS itself.
    pub async fn destroy_snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        // Without the @ it would be the dataset: nobody gets here without one.
        self.run("zfs", &["destroy", &format!("{dataset}@{name}")], DEADLINE).await.map(drop)
    }

    /// Lets a pool use all of its devices.
    pub async fn expand(&self, pool: &PoolName, devices: &[PathBuf]) -> Result<(), Fault> {
        let mut arguments: Vec<&OsStr> = vec!["online".as_ref(), "-e".as_ref(), pool.as_str().as_ref()];
        arguments.extend(devices.iter().map(|device| device.as_os_str()));
        self.zpool(&arguments).await.map(drop)
    }

    /// Takes a device out of a mirror.
    pub async fn detach(&self, pool: &PoolName, leaf: u64) -> Result<(), Fault> {
        self.zpool(&["detach", pool.as_str(), &leaf.to_string()]).await.map(drop)
    }

    /// Makes a device a mirror of another one. It is in the labels when this returns, and the resilver has begun: ZFS
    /// waits for the transaction groups that begin it (`spa_vdev_attach`, spa.c).
    pub async fn attach(&self, pool: &PoolName, of: &Path, new: &Path, force: bool) -> Result<(), Fault> {
        let mut arguments: Vec<&OsStr> = vec!["attach".as_ref()];
        arguments.extend(force.then_some(OsStr::new("-f")));
        arguments.extend([pool.as_str().as_ref(), of.as_os_str(), new.as_os_str()]);
        self.run("zpool", &arguments, IMPORT_DEADLINE).await.map(drop)
    }

    /// Opens the devices of a pool anew; `clear` also resumes a suspended one (zpool-clear(8)).
    pub async fn resume(&self, pool: &PoolName, suspended: bool) -> Result<(), Fault> {
        self.zpool(&[if suspended { "clear" } else { "reopen" }, pool.as_str()]).await.map(drop)
    }

    /// Writes out all that a pool holds in memory.
    pub async fn sync(&self, pool: &PoolName) -> Result<(), Fault> {
        self.zpool(&["sync", pool.as_str()]).await.map(drop)
    }

    /// Exports a pool.
    pub async fn export(&self, pool: &PoolName) -> Result<(), Fault> {
        self.zpool(&["export", pool.as_str()]).await.map(drop)
    }

    /// Starts, pauses or stops a scrub.
    pub async fn scrub(&self, pool: &PoolName, action: Scrub) -> Result<(), Fault> {
        let option = match action {
            Scrub::Start => None,
            Scrub::Pause => Some("-p"),
            Scrub::Stop => Some("-s"),
        };
        let arguments: Vec<_> = ["scrub"].into_iter().chain(option).chain([pool.as_str()]).collect();
        self.zpool(&arguments).await.map(drop)
    }
}

fn keys(kind: PropertyKind) -> impl Iterator<Item = &'static str> {
    Property::all().iter().filter(move |property| property.kind == kind).map(|property| property.key)
}

/// `prompt` is the standard input where that is no terminal (`get_key_material`, libzfs_crypto.c).
fn key_properties(key: &Key) -> [String; 2] {
    [format!("keyformat={}", key.format().as_str()), "keylocation=prompt".to_owned()]
}

fn settings(properties: &[(String, String)]) -> Vec<String> {
    let setting = |(key, value): &(String, String)| match (key.as_str(), value.parse()) {
        ("volsize", Ok(bytes)) => format!("volsize={}", whole_blocks(Bytes(bytes))),
        _ => format!("{key}={value}"),
    };
    properties.iter().map(setting).collect()
}

/// The size of a block device that holds so much: ZFS refuses one that is no multiple of its blocks. What the node asks for
/// is one, unless the volume was made before that was so.
fn whole_blocks(size: Bytes) -> u64 {
    size.round_up(DiskLayout::BLOCK_DEVICE_UNIT).0
}

/// What a tool said, in one line: it quotes names, which are a tenant's, and this is read on terminals.
fn plain(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let words: Vec<_> = text.split(|part: char| part.is_whitespace() || part.is_control()).collect();
    words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ").chars().take(ERROR_TEXT).collect()
}

/// Reads all of it and keeps the first part: a tool that is not read blocks.
async fn bounded(from: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    if let Some(from) = from {
        let mut head = from.take(OUTPUT);
        // What could not be read is missing from JSON, which then does not parse.
        let _ = head.read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut head.into_inner(), &mut tokio::io::sink()).await;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_device_has_whole_blocks() {
        let of = |key: &str, value: &str| settings(&[(key.to_owned(), value.to_owned())]).remove(0);
        assert_eq!(of("volsize", "1000000000"), "volsize=1000079360");
        assert_eq!(of("volsize", "1073741824"), "volsize=1073741824");
        assert_eq!(of("refquota", "1000000000"), "refquota=1000000000");
    }
}
