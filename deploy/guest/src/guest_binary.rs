//! The guest's init: zpod-guest, built as one static binary.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use crate::{Error, Result, command};

const BUILD_DEADLINE: Duration = Duration::from_secs(30 * 60);
const PACKAGE: &str = "zpod-guest";
/// `PT_INTERP` in ELF: the program asks for a dynamic loader.
const PT_INTERP: u32 = 3;

/// Builds zpod-guest from the workspace at `workspace` and returns its path.
///
/// # Errors
/// cargo fails; its messages have gone to standard error.
pub fn build(workspace: &Path) -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").map_or_else(|| command::find("cargo"), |path| Ok(PathBuf::from(path)))?;
    let mut build = Command::new(cargo);
    build.current_dir(workspace).args(["build", "--profile", "guest", "--package", PACKAGE]);
    // Naming the target keeps the flags below away from build scripts.
    build.args(["--target", "x86_64-unknown-linux-gnu", "--message-format", "json-render-diagnostics"]);
    build.env("RUSTFLAGS", "-C target-feature=+crt-static").env_remove("CARGO_ENCODED_RUSTFLAGS");
    let messages = command::output(&mut build, BUILD_DEADLINE)?;
    executable(&String::from_utf8_lossy(&messages)).ok_or_else(|| Error::BadGuestBinary {
        path: workspace.join("guest"),
        reason: format!("cargo built no binary called {PACKAGE}"),
    })
}

/// cargo's JSON messages name the file: no guessing where the target directory is.
fn executable(messages: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == PACKAGE)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

/// Reads a guest binary, refusing one that the kernel could not start as the
/// first process of an initramfs without libraries.
///
/// # Errors
/// [`Error::BadGuestBinary`] unless it is a static x86-64 ELF executable.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let bad = |reason: &str| Error::BadGuestBinary { path: path.to_owned(), reason: reason.to_owned() };
    match interpreter_wanted(&bytes) {
        None => Err(bad("it is no x86-64 ELF file")),
        Some(true) => {
            Err(bad("it is dynamically linked: build it with RUSTFLAGS='-C target-feature=+crt-static' and --target"))
        }
        Some(false) => Ok(bytes),
    }
}

/// Whether an x86-64 ELF file has a `PT_INTERP` header; `None` if it is none.
fn interpreter_wanted(elf: &[u8]) -> Option<bool> {
    let half = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let is_x86_64 = elf.starts_with(b"\x7fELF\x02\x01") && half(18)? == 62;
    if !is_x86_64 {
        return None;
    }
    let table = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (usize::from(half(54)?), usize::from(half(56)?));
    for index in 0..count {
        let at = table.checked_add(index * size)?;
        let kind = u32::from_le_bytes(elf.get(at..at.checked_add(4)?)?.try_into().ok()?);
        if kind == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_binary_is_refused_with_the_flag_that_makes_it_static() {
        // The test itself is dynamic.
        let error = read(&env::current_exe().unwrap()).unwrap_err().to_string();
        assert!(error.contains("crt-static"), "{error}");
    }

    #[test]
    fn what_is_no_elf_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        for bytes in [&b"#!/bin/sh\n"[..], b"", b"\x7fELF\x02\x01"] {
            fs::write(&path, bytes).unwrap();
            assert!(matches!(read(&path), Err(Error::BadGuestBinary { .. })));
        }
    }

    #[test]
    fn the_executable_is_the_one_cargo_names() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"zpod_guest"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"zpod-guest"},"executable":"/t/zpod-guest"}"#;
        assert_eq!(executable(messages), Some(PathBuf::from("/t/zpod-guest")));
        assert_eq!(executable(""), None);
    }
}
