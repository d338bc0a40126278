//! PostgreSQL from Debian's packages, in the root file system of the containers: an application that nobody here wrote.
//!
//! The packages are unpacked beside nothing of the machine's and not installed; what the programs need of them is an
//! archive in the cache, which the guest's kernel unpacks behind the initrd.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use zpod_image::cache::{self, Cache};
use zpod_image::{Archive, Error, command, debian};

use crate::base_initrd::ROOTFS;

/// The package.
const PACKAGE: &str = "postgresql-15";
/// Where its programs are, in the package and in the container.
pub const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";
const WANTED: [&str; 7] = ["postgres", "initdb", "pg_ctl", "pg_isready", "psql", "pgbench", "pg_amcheck"];
/// What the server loads by itself, and what `pg_amcheck` has it load.
const MODULES: [&str; 3] = ["plpgsql.so", "dict_snowball.so", "amcheck.so"];
const SHARE: &str = "/usr/share/postgresql/15";
/// Not needed to run.
const LEFT_OUT: [&str; 2] = ["man", "locale"];
/// Changes when what is taken from the packages does.
const RECIPE: &str = "1";
const ARCHIVE: &str = "postgresql.cpio";
const PATIENCE: Duration = Duration::from_secs(20 * 60);

/// The archive, from the cache or made now.
///
/// # Errors
/// When the packages can't be had, or this isn't root.
pub fn archive() -> Result<PathBuf> {
    let cache = Cache::from_env()?;
    let mut madison = Command::new(command::find("apt-cache")?);
    let versions = command::output(madison.args(["madison", PACKAGE, "libc6"]), PATIENCE)?;
    let key = cache::key([RECIPE, ROOTFS, &String::from_utf8_lossy(&versions)]);
    let made = cache.entry("postgresql", &key, |dir| {
        let tree = dir.join("tree");
        unpack(&tree, &cache.dir().join(format!("postgresql-{key}.log")))?;
        let collected = collect(&tree).and_then(|archive| Ok(archive.to_cpio()?));
        let bytes = collected.map_err(|error| unfit(&tree, &error))?;
        let to = dir.join(ARCHIVE);
        fs::write(&to, bytes).map_err(Error::io("write", &to))?;
        fs::remove_dir_all(&tree).map_err(Error::io("remove", &tree))
    })?;
    Ok(made.path().join(ARCHIVE))
}

fn unfit(tree: &Path, error: &anyhow::Error) -> Error {
    Error::io("take PostgreSQL from", tree)(std::io::Error::other(format!("{error:#}")))
}

/// The package and all that it depends on. Nothing of it is run.
fn unpack(tree: &Path, log: &Path) -> zpod_image::Result<()> {
    let mut unpack = Command::new(command::find("mmdebstrap")?);
    unpack.args(["--mode=root", "--variant=extract", "--format=directory"]);
    unpack.arg("--aptopt=APT::Install-Recommends \"false\"");
    if let Some(proxy) = debian::proxy()? {
        unpack.arg(format!("--aptopt={proxy}"));
    }
    unpack.arg(format!("--include={PACKAGE}")).arg(debian::RELEASE).arg(tree).args(debian::sources()?);
    unpack.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("LC_ALL", "C");
    command::logged(&mut unpack, log, PATIENCE)
}

fn collect(tree: &Path) -> Result<Archive> {
    let mut archive = Archive::new();
    let modules = Path::new(PROGRAMS).with_file_name("lib");
    let programs = WANTED.iter().map(|name| Path::new(PROGRAMS).join(name));
    let own: Vec<_> = programs.chain(MODULES.iter().map(|name| modules.join(name))).collect();
    let mut all: BTreeSet<PathBuf> = own.iter().cloned().collect();
    for path in &own {
        all.extend(libraries(tree, path)?);
    }
    for path in all {
        let mut within = String::from(ROOTFS);
        for part in path.parent().into_iter().flat_map(Path::iter).skip(1) {
            within.push('/');
            within.push_str(&part.to_string_lossy());
            archive.dir(&within, 0o755);
        }
        archive.file(&format!("{ROOTFS}{}", path.display()), read(&inside(tree, &path))?, 0o755);
    }
    archive.dir(&format!("{ROOTFS}/usr/share"), 0o755).dir(&format!("{ROOTFS}/usr/share/postgresql"), 0o755);
    share(&mut archive, tree, Path::new(SHARE))?;
    Ok(archive)
}

fn share(archive: &mut Archive, tree: &Path, dir: &Path) -> Result<()> {
    archive.dir(&format!("{ROOTFS}{}", dir.display()), 0o755);
    let from = inside(tree, dir);
    for entry in fs::read_dir(&from).with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        let path = dir.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() && !LEFT_OUT.iter().any(|name| path.ends_with(name)) {
            share(archive, tree, &path)?;
        } else if kind.is_file() {
            archive.file(&format!("{ROOTFS}{}", path.display()), read(&entry.path())?, 0o644);
        }
    }
    Ok(())
}

/// What the packages' own loader would load with it, without a look at the machine's libraries.
fn libraries(tree: &Path, path: &Path) -> Result<Vec<PathBuf>> {
    let dirs = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu"];
    let places = dirs.map(|dir| inside(tree, Path::new(dir)).display().to_string()).join(":");
    let loader = inside(tree, Path::new("/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"));
    let mut list = Command::new(&loader);
    list.args(["--inhibit-cache", "--library-path", &places, "--list"]).arg(inside(tree, path));
    let text = String::from_utf8_lossy(&command::output(&mut list, PATIENCE)?).into_owned();
    ensure!(!text.contains("not found"), "{} lacks libraries:\n{text}", path.display());
    let words = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.filter_map(|word| Some(Path::new("/").join(Path::new(word).strip_prefix(tree).ok()?))).collect())
}

fn inside(tree: &Path, path: &Path) -> PathBuf {
    tree.join(path.strip_prefix("/").unwrap_or(path))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
