use std::time::Duration;

use tokio::time::Instant;

/// A bound for how often something may happen: `burst` times at once, then once each `every`. In any stretch of time it
/// is at most `burst` times more than the stretch has `every`s.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    burst: u32,
    every: Duration,
    /// When all of the burst is there again.
    full: Option<Instant>,
}

impl Bucket {
    pub(crate) fn new(burst: u32, every: Duration) -> Self {
        Self { burst, every, full: None }
    }

    /// When it may happen next; `None` for now.
    pub(crate) fn ready(&self, now: Instant) -> Option<Instant> {
        let ready = self.full?.checked_sub(self.every * self.burst.saturating_sub(1))?;
        (ready > now).then_some(ready)
    }

    /// Whether all of the burst is there.
    pub(crate) fn is_full(&self, now: Instant) -> bool {
        self.full.is_none_or(|full| full <= now)
    }

    /// Notes that it happens.
    pub(crate) fn take(&mut self, now: Instant) {
        self.full = Some(self.full.map_or(now, |full| full.max(now)) + self.every);
    }

    /// Takes, where it may happen now.
    pub(crate) fn try_take(&mut self, now: Instant) -> bool {
        let ready = self.ready(now).is_none();
        if ready {
            self.take(now);
        }
        ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn after_a_burst_it_is_the_rate_and_after_a_rest_the_burst_is_back() {
        let (mut bucket, begun) = (Bucket::new(3, Duration::from_secs(20)), Instant::now());
        let mut taken = 0;
        for second in 0..3600 {
            taken += u32::from(bucket.try_take(begun + Duration::from_secs(second)));
        }
        assert_eq!(taken, 3 + 3600 / 20 - 1);
        let later = begun + Duration::from_secs(4000);
        assert_eq!((0..9).filter(|_| bucket.try_take(later)).count(), 3);
        assert_eq!(bucket.ready(later), Some(later + Duration::from_secs(20)));
    }
}
