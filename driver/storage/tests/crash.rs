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
