//! The floor: what the system calls alone cost that a durable create and delete of a file and its record need.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};
use zpod_e2e::report::Table;
use zpod_e2e::workdir::Workdir;

use crate::times::Times;

const RECORD: [u8; 512] = [b'x'; 512];
static TABLE: [u8; 17 << 10] = [0; 17 << 10];
const SPARSE: u64 = 8 << 30;

/// One client, `cycles` times: a sparse file with its table and a record, each written aside, synced, renamed into
/// place, the directory synced; then both removed.
pub(crate) fn measure(store: &Path, cycles: usize) -> Result<Value> {
    let dir = Workdir::within(store)?;
    let directory = File::open(dir.path())?;
    let mut times = Times::default();
    let begun = Instant::now();
    for cycle in 0..cycles {
        let name = |suffix: &str| dir.path().join(format!("{cycle}{suffix}"));
        let at = Instant::now();
        for (suffix, content, length) in [(".img", &TABLE[..], Some(SPARSE)), (".json", &RECORD[..], None)] {
            let mut file = File::create(name(".tmp"))?;
            if let Some(length) = length {
                file.set_len(length)?;
            }
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(name(".tmp"), name(suffix))?;
            directory.sync_all()?;
        }
        times.add("create", at.elapsed());
        let at = Instant::now();
        for suffix in [".img", ".json"] {
            fs::remove_file(name(suffix))?;
            directory.sync_all()?;
        }
        times.add("delete", at.elapsed());
    }
    let per_second = cycles as f64 / begun.elapsed().as_secs_f64();
    let mut table = Table::new(
        &format!("{}: the floor (bare system calls, one client), milliseconds, p50 / p99", store.display()),
        &["create", "delete", "create+delete/s"],
    );
    let cell = |call: &str| format!("{:.3} / {:.3}", times.of(call).p50, times.of(call).p99);
    table.row(vec![cell("create"), cell("delete"), format!("{per_second:.0}")]);
    table.print();
    Ok(json!({ "millis": times.json(), "createDeletePerSecond": per_second }))
}
