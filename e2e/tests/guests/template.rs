//! Guests that go on from one template are machines of their own: what the tests show with them they could show with any.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::slot::Pair;
use zpod_e2e::{Container, Node, PATIENCE, Runtime, Sandbox};

/// In each, the same commands at about the same time after their start.
const DRAWN: [&str; 3] = [
    "cat /proc/sys/kernel/random/boot_id",
    "cat /proc/sys/kernel/random/uuid",
    "head -c 16 /dev/urandom | od -An -tx1",
];

#[tokio::test]
async fn two_guests_of_one_template_draw_other_numbers_and_know_what_time_it_is() -> Result<()> {
    let _pair = Pair::take().await?;
    let node = Node::idle()?;
    let mut drawn = Vec::new();
    let (mut one, mut other) = (Sandbox::start(&node, Runtime::Go).await?, Sandbox::start(&node, Runtime::Rs).await?);
    for pod in [&mut one, &mut other] {
        if pod.guest().is_restored() {
            pod.guest().shows("random: crng reseeded due to virtual machine fork", PATIENCE).await?;
        }
        pod.run(Container::new("app", [])).await?;
        let mut texts = Vec::new();
        for command in DRAWN {
            texts.push(pod.sh("app", command).await?);
        }
        drawn.push(texts);
        let told: u64 = pod.sh("app", "date +%s").await?.parse().context("the guest's time")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        ensure!(now.abs_diff(told) < 60, "it is {now}, and the guest says {told}");
    }
    for (one, other) in drawn[0].iter().zip(&drawn[1]) {
        assert_ne!(one, other);
    }
    one.stop().await?;
    other.stop().await
}
