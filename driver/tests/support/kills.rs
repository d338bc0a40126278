//! A kill at every crash point of a life, one at a time.

/// Lives once for each crash point, killed there; every fourth time killed again soon after, while it picks up what the
/// first kill has left. `live` takes the two points and says whether it was killed. Gives how many points there are.
pub(crate) async fn at_each_point(live: impl AsyncFn(u64, Option<u64>) -> bool) -> u64 {
    let mut at = 1;
    while live(at, None).await {
        if at % 4 == 0 {
            live(at, Some(1 + at % 5)).await;
        }
        at += 1;
        assert!(at < 300, "no end of crash points");
    }
    println!("killed at each of {} points", at - 1);
    at - 1
}
