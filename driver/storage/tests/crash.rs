//! `kill -9` between any two steps loses nothing. Children run scripts of calls and are killed at the Nth crash point;
//! what they acknowledged must be there, and the call that was cut short must be as if it had never been made or be
//! finished by being made again. (What a power cut does beyond that is up to fsync, which no test here can watch.)
#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

#[path = "crash/script.rs"]
mod script;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use script::{Call, World};

/// Runs the script in a child that is killed at that crash point; says how many calls it acknowledged, and whether it
/// was killed.
fn run_child(dir: &Path, calls: &[Call], crash_at: u64) -> (usize, bool) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
        .env("ZPOD_TEST_DIR", dir)
        .env("ZPOD_TEST_SCRIPT", serde_json::to_string(calls).unwrap())
        .env("ZPOD_CRASH_AT", crash_at.to_string())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let acknowledged = said.matches("acknowledged ").count();
    let killed = std::os::unix::process::ExitStatusExt::signal(&output.status) == Some(9);
    let cause = String::from_utf8_lossy(&output.stderr);
    assert!(killed || output.status.success(), "the child failed by itself: {said}{cause}");
    assert_eq!(killed, acknowledged < calls.len(), "{said}{cause}");
    (acknowledged, killed)
}

#[test]
#[ignore = "what the other tests run in a process of its own"]
fn child() {
    let dir = std::env::var("ZPOD_TEST_DIR").unwrap();
    let calls: Vec<Call> = serde_json::from_str(&std::env::var("ZPOD_TEST_SCRIPT").unwrap()).unwrap();
    let world = World::open(Path::new(&dir));
    for (n, call) in calls.iter().enumerate() {
        world.make(call);
        println!("acknowledged {n}");
        std::io::stdout().flush().unwrap();
    }
}

/// Runs the script killed at that point and checks what is left; false when the script ends before that point.
fn check(calls: &[Call], crash_at: u64) -> bool {
    let dir = tempfile::tempdir().unwrap();
    World::prepare(dir.path());
    let (acknowledged, killed) = run_child(dir.path(), calls, crash_at);
    let world = World::open(dir.path());
    world.check(&calls[..acknowledged], calls.get(acknowledged));
    // Made again, and the rest after it.
    calls[acknowledged..].iter().for_each(|call| world.make(call));
    world.check(calls, None);
    drop(world);
    World::open(dir.path()).check(calls, None);
    killed
}

/// Kills the script at each of its points in turn.
fn check_every_point(calls: &[Call]) -> u64 {
    (1..).find(|at| !check(calls, *at)).unwrap() - 1
}

#[test]
fn kill_between_any_two_steps_of_a_volumes_life_loses_nothing() {
    for thick in [false, true] {
        let points = check_every_point(&[
            Call::Create { name: 0, mib: 8, thick },
            Call::Create { name: 1, mib: 4, thick },
            Call::Write { name: 0 },
            Call::Grow { name: 0, mib: 12, disk_mib: 80, thick },
            Call::Table { name: 0 },
            Call::Grow { name: 1, mib: 6, disk_mib: 90, thick },
            Call::Destroy { name: 1 },
            Call::Destroy { name: 1 },
        ]);
        assert!(points >= 30, "only {points} points");
    }
}

#[test]
fn kill_between_any_two_steps_of_copies_lives_loses_nothing() {
    for thick in [false, true] {
        let points = check_every_point(&[
            Call::Create { name: 0, mib: 4, thick },
            Call::Write { name: 0 },
            Call::Snapshot { snapshot: 0, of: 0 },
            Call::Restore { name: 1, snapshot: 0, mib: 6, thick },
            Call::Note { name: 1 },
            Call::Destroy { name: 0 },
            Call::Clone { name: 0, of: 1, thick },
            Call::Write { name: 1 },
            Call::Discard { snapshot: 0 },
            Call::Discard { snapshot: 0 },
            Call::Snapshot { snapshot: 1, of: 1 },
            Call::Destroy { name: 1 },
            Call::Grow { name: 0, mib: 8, disk_mib: 80, thick },
        ]);
        assert!(points >= 55, "only {points} points");
    }
}

/// All of it once more where files can share blocks: in a mount namespace of its own, in a child.
#[test]
fn all_is_so_where_files_share_blocks() {
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "on_xfs", "--ignored", "--nocapture"])
        .status()
        .unwrap();
    assert!(status.success(), "{status} (root is needed)");
}

#[test]
#[ignore = "what the other test runs in a mount namespace of its own"]
fn on_xfs() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, at) = (dir.path().join("disk"), dir.path().join("mnt"));
    std::fs::File::create(&disk).unwrap().set_len(4 << 30).unwrap();
    std::fs::create_dir(&at).unwrap();
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new("mkfs.xfs").arg("-q").arg(&disk));
    run(Command::new("mount").args(["-o", "loop"]).args([&disk, &at]));
    run(Command::new(std::env::current_exe().unwrap())
        .args(["--skip", "where_files_share_blocks", "--skip", "records_life"])
        .env("TMPDIR", &at));
    run(Command::new("umount").arg(&at));
}

#[test]
fn kill_between_any_two_steps_of_a_records_life_loses_nothing() {
    let points = check_every_point(&[
        Call::Record { name: 0 },
        Call::Record { name: 1 },
        Call::Update { name: 0, to: 1 },
        Call::Update { name: 0, to: 2 },
        Call::Remove { name: 1 },
        Call::Remove { name: 1 },
        Call::Record { name: 1 },
    ]);
    assert!(points >= 25, "only {points} points");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 64, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_calls_killed_anywhere_lose_nothing(calls in script::calls(), crash_at in 1u64..120) {
        check(&calls, crash_at);
    }
}
