//! A volume's backing file, looked into and damaged while a guest uses it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use tokio::time::{Instant, sleep};
use zpod_e2e::{PATIENCE, Sandbox};

/// ZFS's default: files of random bytes lie in the image in pieces of this size.
pub(crate) const RECORD: u64 = 128 << 10;
/// What pools' blocks are aligned to: `ashift=12`.
const ALIGNMENT: usize = 4096;
/// Bytes that tell a record from all others.
const PREFIX: usize = 48;

/// Writes a file of random bytes, and gives its checksum once it is on the disk.
pub(crate) async fn write(pod: &mut Sandbox, path: &str, records: u64) -> Result<String> {
    let bytes = records * RECORD;
    pod.sh("app", &format!("head -c {bytes} /dev/urandom > {path} && sync && sha256sum < {path}")).await
}

/// Where the copies of a file's records lie in the image: so many of each, once they are written. sync(2) alone puts them
/// into the intent log.
pub(crate) async fn copies(
    pod: &mut Sandbox,
    path: &str,
    image: &Path,
    records: u64,
    copies: usize,
) -> Result<Vec<Vec<u64>>> {
    let mut prefixes = Vec::new();
    for record in 0..records {
        let read =
            format!("dd if={path} bs={RECORD} skip={record} count=1 2>/dev/null | head -c {PREFIX} | base64 -w0");
        let prefix = STANDARD.decode(pod.sh("app", &read).await?).context("base64")?;
        ensure!(prefix.len() == PREFIX, "record {record} of {path} has {} bytes", prefix.len());
        prefixes.push(prefix);
    }
    let end = Instant::now() + PATIENCE;
    loop {
        let found = find(image, &prefixes)?;
        if found.iter().all(|found| found.len() == copies) {
            return Ok(found);
        }
        ensure!(Instant::now() < end, "not {copies} of each record of {path}: {found:x?}");
        sleep(Duration::from_millis(500)).await;
    }
}

fn find(image: &Path, prefixes: &[Vec<u8>]) -> Result<Vec<Vec<u64>>> {
    let file = OpenOptions::new().read(true).open(image)?;
    let (size, mut found) = (file.metadata()?.len(), vec![Vec::new(); prefixes.len()]);
    let mut piece = vec![0; 4 << 20];
    for at in (0..size).step_by(piece.len()) {
        let length = usize::try_from(size - at)?.min(piece.len());
        file.read_exact_at(&mut piece[..length], at)?;
        for (number, block) in piece[..length].chunks(ALIGNMENT).enumerate() {
            let here = prefixes.iter().position(|prefix| block.starts_with(prefix));
            if let Some(record) = here {
                found[record].push(at + (number * ALIGNMENT) as u64);
            }
        }
    }
    Ok(found)
}

/// Overwrites some bytes in the middle of a record.
pub(crate) fn damage(image: &Path, record: u64) -> Result<()> {
    let file = OpenOptions::new().write(true).open(image)?;
    file.write_all_at(&[0x5A; 4096], record + RECORD / 2)?;
    file.sync_all().context("write to the image")
}
