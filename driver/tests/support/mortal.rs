//! A zpod that is killed and started again, in tests of one life with kills in it.

use tonic::Status;

use crate::calls::Calls;
use crate::daemon::{Daemon, Node};

/// A zpod that is killed at crash points, and started again each time.
pub(crate) struct Mortal<'a> {
    node: &'a Node,
    kills: std::vec::IntoIter<u64>,
    daemon: Daemon,
    /// To call it as it is now.
    pub(crate) calls: Calls,
    /// Whether it was ever killed.
    pub(crate) killed: bool,
}

impl<'a> Mortal<'a> {
    /// Starts it. It is killed at the Nth point, and at `again` points after its next start.
    pub(crate) fn start(node: &'a Node, at: u64, again: Option<u64>) -> Self {
        let mut kills = [Some(at), again].into_iter().flatten().collect::<Vec<_>>().into_iter();
        let daemon = node.start(kills.next());
        let calls = Calls::new(daemon.channel());
        Self { node, kills, daemon, calls, killed: false }
    }

    /// What a call gave. `None` where it was killed in it: it runs again then, and the call is to be repeated.
    pub(crate) fn lived<T>(&mut self, answer: Result<T, Status>, context: &str) -> Option<T> {
        let status = match answer {
            Ok(given) => return Some(given),
            Err(status) => status,
        };
        assert!(self.daemon.crashed(), "{context}: {status:?}\n{}", self.node.log());
        self.killed = true;
        self.daemon = self.node.start(self.kills.next());
        self.calls = Calls::new(self.daemon.channel());
        None
    }
}
