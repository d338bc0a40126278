//! A handler of RuntimeClasses, and what Kata's configuration says for it.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};

use super::Runtime;

/// A handler of RuntimeClasses, and what it stands for: `NAME=go` or `NAME=rust`, as zpod-node is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// Its name.
    pub name: String,
    /// Which of Kata's runtimes.
    pub runtime: Runtime,
}

impl FromStr for Handler {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, runtime) = match text.split_once('=') {
            Some((name, "go")) => (name, Runtime::Go),
            Some((name, "rust")) => (name, Runtime::Rs),
            _ => return Err(format!("{text}: NAME=go or NAME=rust")),
        };
        Ok(Self { name: name.to_owned(), runtime })
    }
}

impl Handler {
    /// Where kata-deploy puts the drop-in of its own runtimes, below a node's root.
    pub fn drop_in(name: &str) -> PathBuf {
        Path::new("opt/kata/share/defaults/kata-containers/custom-runtimes")
            .join(name)
            .join("config.d/50-overrides.toml")
    }

    /// Whether its shim plugs disks in, by the drop-in of a node. Without a word there, the Go runtime does not, as it is
    /// shipped (`disable_block_device_use = true`), and runtime-rs does.
    ///
    /// # Errors
    /// When the drop-in can't be read, or says neither.
    pub fn plugs_disks(&self, root: &Path) -> Result<bool> {
        let path = root.join(Self::drop_in(&self.name));
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            text => text.with_context(|| format!("read {}", path.display()))?,
        };
        let settings = text.lines().filter_map(|line| line.split_once('='));
        let mut settings = settings.map(|(key, value)| (key.trim(), value.trim()));
        match settings.rfind(|(key, _)| *key == "disable_block_device_use") {
            None => Ok(self.runtime == Runtime::Rs),
            Some((_, "true")) => Ok(false),
            Some((_, "false")) => Ok(true),
            Some((key, value)) => bail!("{}: {key} = {value}: true or false", path.display()),
        }
    }
}
