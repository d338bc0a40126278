//! `zfs` and `zpool` in a container: this program under another name, which starts the guest's own tool.
//!
//! # Design
//! A container that may use ZFS has [`PLACE`] mounted read-only: the tools in `libexec`, their loader and libraries in
//! `lib`, and in `bin` this program, which is static, under the tools' names. The tools are the guest image's own, built
//! for glibc; an image may have another one, another C library, or no shell. So the loader is told where the libraries
//! are, and nothing of the image's is used. What the image preloads into its own programs (`LD_PRELOAD`) is left out.
//!
//! The files are the guest's own, by hard links, which take no memory.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::zfs::loader;

/// Where containers have the tools.
pub const PLACE: &str = "/opt/zpod";

/// The tools.
const TOOLS: [&str; 2] = ["zfs", "zpool"];

/// The tool by whose name this program was called.
pub fn called(program: Option<&OsStr>) -> Option<&'static str> {
    let name = Path::new(program?).file_name()?;
    TOOLS.into_iter().find(|tool| name == *tool)
}

/// Becomes the tool. Returns only where that fails.
pub fn run(tool: &str, arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (libraries, program) = (Path::new(PLACE).join("lib"), Path::new(PLACE).join("libexec").join(tool));
    let Some(loader) = loader(&libraries) else {
        eprintln!("{tool}: {PLACE}/lib has no loader: these tools run where zpod has mounted them only");
        return ExitCode::from(127);
    };
    let mut command = Command::new(loader);
    command.arg("--library-path").arg(&libraries).arg("--argv0").arg(tool).arg(program).args(arguments);
    command.env_remove("LD_PRELOAD").env_remove("LD_AUDIT");
    // There is no udev in a guest: see the tools that zpod-guest runs.
    command.env("ZFS_VDEV_DEVID_OPT_OUT", "YES");
    let error = command.exec();
    eprintln!("{tool}: {PLACE}/libexec/{tool} can't be started: {error}");
    ExitCode::from(126)
}

/// Puts together, below `root` (`/zpod`), what containers have mounted. What is there already stays.
///
/// # Errors
/// When the files are not there.
pub fn assemble(root: &Path) -> io::Result<PathBuf> {
    let place = root.join("container");
    let [programs, libraries, real] = ["bin", "lib", "libexec"].map(|name| place.join(name));
    for directory in [&programs, &libraries, &real] {
        fs::create_dir_all(directory)?;
    }
    for tool in TOOLS {
        link(&root.join("init"), &programs.join(tool))?;
        link(&root.join("bin").join(tool), &real.join(tool))?;
    }
    for library in fs::read_dir(root.join("lib"))? {
        let library = library?;
        link(&library.path(), &libraries.join(library.file_name()))?;
    }
    Ok(place)
}

fn link(file: &Path, name: &Path) -> io::Result<()> {
    match fs::hard_link(file, name) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(io::Error::new(error.kind(), format!("{}: {error}", file.display())))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn it_is_a_tool_by_its_name_only() {
        for (program, want) in [
            ("/opt/zpod/bin/zfs", Some("zfs")),
            ("zpool", Some("zpool")),
            ("/zpod/init", None),
            ("/zfs/init", None),
            ("", None),
        ] {
            assert_eq!(called(Some(OsStr::new(program))), want, "{program}");
        }
        assert_eq!(called(None), None);
    }

    #[test]
    fn what_containers_have_is_the_guests_own_files() {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str| root.path().join(path);
        assert!(assemble(root.path()).unwrap_err().to_string().contains("init"));
        for directory in ["bin", "lib"] {
            fs::create_dir_all(file(directory)).unwrap();
        }
        for name in ["init", "bin/zfs", "bin/zpool", "lib/ld-linux-x86-64.so.2", "lib/libzfs.so.6"] {
            fs::write(file(name), name).unwrap();
        }
        for _ in 0..2 {
            assert_eq!(assemble(root.path()).unwrap(), file("container"));
        }
        let inode = |path: &str| fs::metadata(file(path)).unwrap().ino();
        for (own, linked) in [
            ("init", "container/bin/zfs"),
            ("init", "container/bin/zpool"),
            ("bin/zfs", "container/libexec/zfs"),
            ("lib/libzfs.so.6", "container/lib/libzfs.so.6"),
        ] {
            assert_eq!(inode(own), inode(linked), "{linked}");
        }
        assert!(loader(&file("container/lib")).is_some());
    }
}
