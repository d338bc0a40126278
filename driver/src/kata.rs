//! What Kata Containers expects and offers on the host: direct volumes, block devices, and a socket for each sandbox.

mod device_target;
mod direct_volume;
mod halves;
mod loop_device;
mod mapper;
mod runtime;
mod sandbox;
mod target;
pub mod udev_rule;

pub use direct_volume::{DirectVolume, DirectVolumes};
pub use halves::{Halves, MappedHalves};
pub use loop_device::LoopDevice;
pub use mapper::{Mapper, MapperError, Removal};
pub use runtime::{KataRuntime, RuntimeHandler};
pub use sandbox::{AgentUrl, Sandbox, SandboxError, discover};
pub use target::{MAX_TARGET_BYTES, TargetPath, is_same_place};

use std::path::{Path, PathBuf};

/// Why a direct volume or a target path could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum KataError {
    /// A target path that Kata or the host can't use.
    #[error("target_path {path:?}: {reason}")]
    Target {
        /// The path as it was given.
        path: PathBuf,
        /// What is wrong with it, and what is allowed.
        reason: String,
    },
    /// The device of a mirror could not be made or removed.
    #[error(transparent)]
    Mapper(#[from] MapperError),
    /// Something else is at the target path.
    #[error("target path {path}: {reason}; nothing was changed there")]
    Occupied {
        /// The path.
        path: PathBuf,
        /// What was found.
        reason: &'static str,
    },
    /// The operating system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried, such as `mount`.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl KataError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { what, path, source }
    }

    fn os(what: &'static str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> Self {
        let path = path.to_owned();
        move |errno| Self::Io { what, path, source: errno.into() }
    }
}
