//! The build cache: outside the tree, keyed by inputs, safe against being
//! killed and against two builds at once.
//!
//! An entry is a directory `KIND-KEY`, made under a temporary name and renamed
//! into place when complete; so an entry that exists is whole. One lock per
//! kind keeps concurrent builders from doing the same work twice.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::{Error, Result};

/// The cache directory of this user: `$ZPOD_CACHE`, `$XDG_CACHE_HOME/zpod` or
/// `$HOME/.cache/zpod`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cache {
    dir: PathBuf,
}

/// Whether a cache entry was made now or was there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Built by this call.
    Created(PathBuf),
    /// Found whole from before.
    Existed(PathBuf),
}

impl Outcome {
    /// Where the entry is.
    #[must_use]
    pub fn path(&self) -> &Path {
        match self {
            Self::Created(path) | Self::Existed(path) => path,
        }
    }
}

impl Cache {
    /// The cache the environment asks for.
    ///
    /// # Errors
    /// [`Error::NoCacheDir`] without `ZPOD_CACHE`, `XDG_CACHE_HOME` and `HOME`.
    pub fn from_env() -> Result<Self> {
        let var = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        var("ZPOD_CACHE")
            .or_else(|| var("XDG_CACHE_HOME").map(|dir| dir.join("zpod")))
            .or_else(|| var("HOME").map(|dir| dir.join(".cache/zpod")))
            .map(Self::at)
            .ok_or(Error::NoCacheDir)
    }

    /// A cache in the directory `dir`, made when first needed.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// The cache's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the latest guest image is kept unless another place is asked for.
    #[must_use]
    pub fn guest_image(&self) -> PathBuf {
        self.dir.join("guest-image")
    }

    /// The entry `kind-key`; when it is missing, `build` fills a directory for
    /// it, which is then renamed into place.
    ///
    /// # Errors
    /// The cache can't be written, or `build` fails: nothing stays then, and
    /// the next call builds again.
    pub fn entry(&self, kind: &str, key: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<Outcome> {
        let place = self.dir.join(format!("{kind}-{key}"));
        if place.exists() {
            return Ok(Outcome::Existed(place));
        }
        let _lock = self.lock(kind)?;
        // Another builder may have made it while this one waited.
        if place.exists() {
            return Ok(Outcome::Existed(place));
        }
        let aside = self.dir.join(format!("{kind}-{key}.partial"));
        remove(&aside)?;
        fs::create_dir(&aside).map_err(Error::io("create", &aside))?;
        build(&aside)?;
        // Everything must be on disk before the name says that it is.
        rustix::fs::syncfs(File::open(&aside).map_err(Error::io("open", &aside))?)
            .map_err(|error| Error::io("sync", &aside)(error.into()))?;
        fs::rename(&aside, &place).map_err(Error::io("rename to", &place))?;
        Ok(Outcome::Created(place))
    }

    /// Takes the lock called `name`, waiting for whoever has it; it is
    /// released when the returned file is dropped or its process dies.
    ///
    /// # Errors
    /// The cache directory can't be written.
    pub fn lock(&self, name: &str) -> Result<File> {
        fs::create_dir_all(&self.dir).map_err(Error::io("create", &self.dir))?;
        let path = self.dir.join(format!(".{name}.lock"));
        let file = File::create(&path).map_err(Error::io("create", &path))?;
        file.lock().map_err(Error::io("lock", &path))?;
        Ok(file)
    }
}

/// A key from the inputs it stands for: the start of their SHA-256.
#[must_use]
pub fn key<'a>(inputs: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update(input.as_bytes());
        hash.update([0]);
    }
    hex(&hash.finalize())[..16].to_owned()
}

/// SHA-256 of some bytes, in hexadecimal.
#[must_use]
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Removes what a killed build left, unless something is mounted in it: a
/// recursive removal would go into that.
fn remove(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(Error::io("read", "/proc/self/mountinfo"))?;
    let real = fs::canonicalize(dir).map_err(Error::io("resolve", dir))?;
    let below =
        mounts.lines().filter_map(|line| line.split(' ').nth(4)).find(|mount| Path::new(mount).starts_with(&real));
    if let Some(mount) = below {
        return Err(Error::Mounted { path: real, mount: mount.to_owned() });
    }
    fs::remove_dir_all(dir).map_err(Error::io("remove", dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_built_once_and_found_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let first =
            cache.entry("kind", "key", |dir| fs::write(dir.join("a"), "1").map_err(Error::io("write", "a"))).unwrap();
        assert!(matches!(&first, Outcome::Created(path) if path.join("a").exists()));
        let second = cache.entry("kind", "key", |_| Err(Error::NoMirror)).unwrap();
        assert_eq!(second, Outcome::Existed(first.path().to_owned()));
    }

    #[test]
    fn a_build_that_failed_or_was_killed_leaves_no_entry_and_is_done_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        // Being killed looks the same as this: a filled ".partial" directory.
        let failed = cache.entry("kind", "key", |dir| {
            fs::write(dir.join("half"), "1").unwrap();
            Err(Error::NoMirror)
        });
        assert!(failed.is_err());
        let again = cache.entry("kind", "key", |dir| {
            assert_eq!(fs::read_dir(dir).unwrap().count(), 0);
            Ok(())
        });
        assert!(matches!(again, Ok(Outcome::Created(_))));
    }

    #[test]
    fn two_builders_at_once_build_one_entry() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let builds = std::sync::atomic::AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let built = cache.entry("kind", "key", |_| {
                        builds.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                        std::thread::sleep(std::time::Duration::from_millis(50));
                        Ok(())
                    });
                    built.unwrap();
                });
            }
        });
        assert_eq!(builds.into_inner(), 1);
    }

    #[test]
    fn keys_differ_when_the_boundary_between_inputs_moves() {
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
    }
}
