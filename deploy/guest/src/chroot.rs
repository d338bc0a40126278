//! The build chroot: a small Debian in the cache in which DKMS builds OpenZFS
//! for Debian's cloud kernel.
//!
//! The compiler and the kernel's headers are removed afterwards; what stays is
//! what the image is taken from, and the tools (`strip`, `xz`) it is made with,
//! so that the host's versions of those don't show in the image.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{
    Error, Result,
    cache::{self, Cache, Outcome},
    command,
    debian::{self, Versions},
};

/// Changes when the steps below do, so that older chroots aren't taken for new.
const RECIPE: &str = "1";
/// DKMS takes 4 minutes on 2 cores; downloads come on top.
const BUILD_DEADLINE: Duration = Duration::from_secs(45 * 60);
const TOOL_DEADLINE: Duration = Duration::from_secs(60);
/// Where libraries are, relative to the root (Debian 12 has a merged /usr).
pub(crate) const LIB_DIR: &str = "usr/lib/x86_64-linux-gnu";
/// The loader's name; its directory in the chroot is [`LIB_DIR`].
pub const LOADER: &str = "ld-linux-x86-64.so.2";
/// Only needed while DKMS builds.
const BUILD_ONLY: [&str; 7] =
    ["usr/src", "usr/lib/gcc", "usr/libexec/gcc", "usr/include", "var/lib/apt/lists", "var/cache", "var/lib/dkms"];

/// A finished build chroot.
#[derive(Debug, Clone)]
pub struct Chroot {
    root: PathBuf,
    release: String,
}

impl Chroot {
    /// The chroot for these package versions, from the cache or built now.
    ///
    /// # Errors
    /// It isn't cached and this isn't root, or a package can't be had.
    pub fn for_versions(cache: &Cache, versions: &Versions) -> Result<(Self, Outcome)> {
        let pairs: Vec<String> = versions.pairs().collect();
        let key = cache::key([RECIPE].into_iter().chain(pairs.iter().map(String::as_str)));
        let outcome = cache.entry("chroot", &key, |dir| {
            let log = cache.dir().join(format!("chroot-{key}.log"));
            bootstrap(dir, &log, versions)?;
            prune(dir)?;
            let opened = fs::File::open(dir).map_err(Error::io("open", dir))?;
            rustix::fs::syncfs(&opened).map_err(|error| Error::io("sync", dir)(error.into()))
        })?;
        Ok((Self::at(outcome.path())?, outcome))
    }

    /// Opens a finished chroot.
    ///
    /// # Errors
    /// [`Error::BadChroot`] when it does not have exactly one kernel with ZFS.
    pub fn at(root: &Path) -> Result<Self> {
        let bad = |reason: String| Error::BadChroot { root: root.to_owned(), reason };
        let modules = root.join("usr/lib/modules");
        let kernels: Vec<String> = fs::read_dir(&modules)
            .map_err(Error::io("list", &modules))?
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect();
        let [release] = kernels.as_slice() else { return Err(bad(format!("it has the kernels {kernels:?}, not one"))) };
        let chroot = Self { root: root.to_owned(), release: release.clone() };
        let dep = chroot.modules().join("modules.dep");
        let listed = fs::read_to_string(&dep).map_err(Error::io("read", &dep))?;
        if !listed.contains("/zfs.ko") {
            return Err(bad(format!("DKMS made no zfs.ko for {release}")));
        }
        Ok(chroot)
    }

    /// The chroot's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The kernel's release, as `uname -r` will say in the guest.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// The kernel's module directory.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.root.join("usr/lib/modules").join(&self.release)
    }

    /// The bootable kernel.
    #[must_use]
    pub fn vmlinuz(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    /// A program of the chroot, run through the chroot's own loader and
    /// libraries: needs no privilege, and doesn't depend on the host's libc.
    #[must_use]
    pub fn tool(&self, path: &str) -> Command {
        let mut command = self.loader();
        command.arg(self.root.join(path));
        command
    }

    /// The chroot's dynamic loader, ready for options and a program.
    pub(crate) fn loader(&self) -> Command {
        // Not /lib64/ld-linux...: that is an absolute link, into the host.
        let lib = self.root.join(LIB_DIR);
        let mut command = Command::new(lib.join(LOADER));
        command.arg("--inhibit-cache").arg("--library-path").arg(lib);
        command
    }

    /// Runs a tool of the chroot and returns its output.
    ///
    /// # Errors
    /// It fails, or takes longer than a minute.
    pub(crate) fn run(command: &mut Command) -> Result<Vec<u8>> {
        command::output(command, TOOL_DEADLINE)
    }

    /// Every installed package and its version.
    ///
    /// # Errors
    /// The chroot's package database can't be read.
    pub fn packages(&self) -> Result<BTreeMap<String, String>> {
        let status = self.root.join("var/lib/dpkg/status");
        let text = fs::read_to_string(&status).map_err(Error::io("read", &status))?;
        Ok(text
            .split("\n\n")
            .filter_map(|stanza| Some((field(stanza, "Package")?, field(stanza, "Version")?)))
            .collect())
    }

    /// The package a file belongs to; `path` is relative to the root.
    ///
    /// # Errors
    /// The chroot's package database can't be read.
    pub fn owner(&self, path: &str) -> Result<Option<String>> {
        // Packages record files under /lib or /usr/lib, as they were built.
        let forms = [format!("/{path}"), format!("/{}", path.strip_prefix("usr/").unwrap_or(path))];
        let info = self.root.join("var/lib/dpkg/info");
        for entry in fs::read_dir(&info).map_err(Error::io("list", &info))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some(package) = name.strip_suffix(".list") else { continue };
            let list = fs::read_to_string(entry.path()).map_err(Error::io("read", entry.path()))?;
            if list.lines().any(|line| forms.iter().any(|form| form == line)) {
                return Ok(package.split(':').next().map(str::to_owned));
            }
        }
        Ok(None)
    }
}

fn field(stanza: &str, name: &str) -> Option<String> {
    stanza.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(": ")?.to_owned()))
}

fn bootstrap(dir: &Path, log: &Path, versions: &Versions) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::NeedsRoot);
    }
    // Own mount and process namespaces, and the parent's death as a signal:
    // when this process is killed, everything that runs in the chroot and
    // everything mounted in it goes too, before another build starts over.
    let mut build = Command::new(command::find("setpriv")?);
    build.args(["--pdeathsig", "KILL", "--"]).arg(command::find("unshare")?);
    build.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--"]);
    build.arg(command::find("mmdebstrap")?);
    build.args(["--mode=root", "--variant=minbase", "--format=directory"]);
    build.arg("--aptopt=APT::Install-Recommends \"false\"");
    // The chroot is synced once, when it is whole, and not for each file: what is cut short is built again.
    build.arg("--dpkgopt=force-unsafe-io");
    if let Some(proxy) = debian::proxy()? {
        build.arg(format!("--aptopt={proxy}"));
    }
    build.arg(format!("--include={}", versions.to_install()));
    build.arg(debian::RELEASE).arg(dir).args(debian::sources()?);
    build
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .env("DEBIAN_FRONTEND", "noninteractive");
    command::logged(&mut build, log, BUILD_DEADLINE)
}

fn prune(dir: &Path) -> Result<()> {
    for path in BUILD_ONLY.map(|path| dir.join(path)).iter().filter(|path| path.exists()) {
        fs::remove_dir_all(path).map_err(Error::io("remove", path))?;
    }
    Ok(())
}
