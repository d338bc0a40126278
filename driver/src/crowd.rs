//! Who may be connected to a port that anybody may reach.
//!
//! # Design
//! Nobody waits to be let in: where a port is full, somebody who has proven nothing goes. That is the oldest connection
//! of the address that has the most of them, so that one address with hundreds of silent connections pushes out its own,
//! and one with a single connection stays. Who has proven itself is counted apart and is never pushed out.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The connections of a port.
#[derive(Debug)]
pub(crate) struct Crowd {
    unproven: usize,
    proven: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    next: u64,
    /// By age: the first is the oldest.
    unproven: BTreeMap<u64, (IpAddr, Arc<Notify>)>,
    proven: std::collections::BTreeSet<u64>,
}

/// A connection. Its place is free when it is dropped.
#[derive(Debug)]
pub(crate) struct Member {
    crowd: Arc<Crowd>,
    number: u64,
    peer: IpAddr,
    out: Arc<Notify>,
}

impl Crowd {
    /// At most so many that have proven nothing, and so many that have.
    pub(crate) fn new(unproven: usize, proven: usize) -> Arc<Self> {
        Arc::new(Self { unproven, proven, inner: Mutex::default() })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a connection in, and somebody else out where there is no room.
    pub(crate) fn enter(self: &Arc<Self>, peer: IpAddr) -> Member {
        let peer = peer.to_canonical();
        let out = Arc::new(Notify::new());
        let mut inner = self.inner();
        let number = inner.next;
        inner.next += 1;
        inner.unproven.insert(number, (peer, out.clone()));
        while inner.unproven.len() > self.unproven {
            let Some(oldest) = inner.oldest_of_the_most() else { break };
            if let Some((_, out)) = inner.unproven.remove(&oldest) {
                out.notify_one();
            }
        }
        drop(inner);
        Member { crowd: self.clone(), number, peer, out }
    }
}

impl Inner {
    fn oldest_of_the_most(&self) -> Option<u64> {
        let mut of_peer: HashMap<IpAddr, (usize, u64)> = HashMap::new();
        for (number, (peer, _)) in &self.unproven {
            of_peer.entry(*peer).or_insert((0, *number)).0 += 1;
        }
        // Of two that have as many, the one that came first.
        of_peer
            .into_values()
            .max_by_key(|(count, oldest)| (*count, std::cmp::Reverse(*oldest)))
            .map(|(_, oldest)| oldest)
    }
}

impl Member {
    /// Where it comes from.
    pub(crate) fn peer(&self) -> IpAddr {
        self.peer
    }

    /// Waits until it has to make room.
    pub(crate) async fn pushed_out(&self) {
        self.out.notified().await;
    }

    /// It has proven that it may be here. False where there are too many of those, or it is pushed out already.
    pub(crate) fn prove(&self) -> bool {
        let mut inner = self.crowd.inner();
        if inner.proven.contains(&self.number) {
            return true;
        }
        if inner.proven.len() >= self.crowd.proven || inner.unproven.remove(&self.number).is_none() {
            return false;
        }
        inner.proven.insert(self.number)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut inner = self.crowd.inner();
        inner.unproven.remove(&self.number);
        inner.proven.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn is_out(member: &Member) -> bool {
        member.pushed_out().now_or_never().is_some()
    }

    #[test]
    fn an_address_with_hundreds_pushes_out_its_own_and_nobody_else() {
        let crowd = Crowd::new(4, 1);
        let victim = crowd.enter(address(1));
        let hostile: Vec<_> = (0..300).map(|_| crowd.enter(address(2))).collect();
        assert!(!is_out(&victim));
        let out = hostile.iter().filter(|member| is_out(member)).count();
        assert_eq!(out, 297, "three are left beside the victim");
        assert!(!is_out(&hostile[299]), "the newest stays");
        let late = crowd.enter(address(3));
        assert!(!is_out(&late) && !is_out(&victim));
        assert!(is_out(&hostile[297]));
    }

    #[test]
    fn of_one_address_the_oldest_goes_and_the_newest_gets_in() {
        let crowd = Crowd::new(2, 1);
        let all: Vec<_> = (0..3).map(|_| crowd.enter(address(1))).collect();
        assert_eq!(all.iter().map(is_out).collect::<Vec<_>>(), [true, false, false]);
        let other = crowd.enter("::ffff:10.0.0.1".parse().unwrap());
        assert_eq!(other.peer(), address(1), "one address has one way to be written");
    }

    #[test]
    fn who_has_proven_itself_stays_and_there_are_so_many_of_those() {
        let crowd = Crowd::new(1, 1);
        let good = crowd.enter(address(1));
        assert!(good.prove() && good.prove());
        let _hostile: Vec<_> = (0..10).map(|_| crowd.enter(address(1))).collect();
        assert!(!is_out(&good));
        let second = crowd.enter(address(1));
        assert!(!second.prove(), "there is one already");
        drop(good);
        assert!(second.prove());
        let gone = crowd.enter(address(1));
        let _next = crowd.enter(address(1));
        drop(second);
        assert!(!gone.prove(), "it is pushed out already");
    }
}
