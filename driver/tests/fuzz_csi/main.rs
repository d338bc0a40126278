//! CSI calls by chance: names, sizes, orders, callers at once, kills, full disks. After each call it is checked that what
//! is there is what must be there: nothing lost, nothing leaked, what is promised adds up, nothing stuck.
//!
//! `make fuzz` runs it for ten minutes, from an episode that nobody knows before. `ZPOD_FUZZ_SECONDS` says for how long,
//! `ZPOD_FUZZ_SEED` which episode comes first: a violation says its seed, and the same seed does the same again, as far as
//! races let it. Without either it is half a minute at most, of the same five episodes each time, so that a run of all tests that fails
//! says something of what was changed. Crash points
//! are tried with the feature `crash-points`. Needs root, mkfs.xfs, mkfs.btrfs and mkfs.ext4.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod call;
mod check;
#[path = "../support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
mod disk;
mod end;
#[path = "../support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;
mod machine;
mod model;
#[path = "../support/own_mounts.rs"]
mod own_mounts;
mod plan;
mod world;

use std::env;
use std::time::{Duration, Instant};

use disk::Kind;
use fastrand::Rng;
use plan::Plan;
use world::{Counts, World};

/// An episode begins with an empty node and ends with one.
const LONGEST: u64 = 160;
/// So many episodes has a run that is not told how long it is to be.
const SAME_EPISODES: u64 = 5;

fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|value| value.parse().unwrap_or_else(|_| panic!("{variable}={value}: not a number")))
}

async fn episode(seed: u64) -> Counts {
    let mut choice = Rng::with_seed(seed);
    let kind = [Kind::Xfs, Kind::Btrfs, Kind::Ext4][choice.usize(0..3)];
    let steps = choice.u64(5..LONGEST);
    println!("episode {seed}: {steps} steps on {kind:?}");
    let overprovision = if choice.u8(0..4) == 0 { 1000.0 } else { 1.0 };
    let mut world = World::new(choice.u64(..), kind, choice.bool(), overprovision).await;
    for _ in 0..steps {
        let pods = world.node.path("pods");
        let step = Plan { model: &world.model, random: &mut world.random, kind, pods }.next();
        if let Err(wrong) = world.step(step).await {
            world.violation(&format!("{wrong}\n(ZPOD_FUZZ_SEED={seed} begins with this episode)"));
        }
    }
    if let Err(wrong) = world.end().await {
        world.violation(&format!("at the end: {wrong}\n(ZPOD_FUZZ_SEED={seed} begins with this episode)"));
    }
    world.counts
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "what the test runs in a mount namespace of its own"]
async fn episodes() {
    let long = Duration::from_secs(number("ZPOD_FUZZ_SECONDS").unwrap_or(30));
    let long_run = env::var_os("ZPOD_FUZZ_SECONDS").is_some();
    let by_chance = || if long_run { u64::from(Rng::new().u32(..)) } else { 1 };
    let mut seed = number("ZPOD_FUZZ_SEED").unwrap_or_else(by_chance);
    let (begun, mut sum, first) = (Instant::now(), Counts::default(), seed);
    while begun.elapsed() < long && (long_run || sum.episodes < SAME_EPISODES) {
        let counts = episode(seed).await;
        sum.calls += counts.calls;
        sum.refused += counts.refused;
        sum.kills += counts.kills;
        sum.full += counts.full;
        sum.episodes += counts.episodes;
        seed += 1;
    }
    println!("seeds {first} to {}: {sum:?} in {:?}, 0 violations", seed - 1, begun.elapsed());
}

#[test]
fn whatever_is_called_in_whatever_order_nothing_is_lost_leaked_or_stuck() {
    own_mounts::in_own_mounts("episodes");
}
