//! When a guest answers Mark and Unmark.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::Duration;

use tokio::sync::watch;

/// When a call is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Now,
    After(Duration),
    /// When the test opens it, if ever.
    Opened,
}

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Waits,
    Answered,
    GivenUp,
}

/// The calls as they came, and when they are answered.
#[derive(Debug, Default)]
pub(crate) struct Late {
    calls: Mutex<Vec<(&'static str, Fate)>>,
    next: Mutex<VecDeque<When>>,
    shut: watch::Sender<bool>,
}

impl Late {
    /// Says when the next calls are answered. Those behind them are answered at once, or when it is opened.
    pub(crate) fn next(&self, next: &[When]) {
        self.next.lock().unwrap().extend(next);
    }

    pub(crate) fn shut(&self, shut: bool) {
        self.shut.send_replace(shut);
    }

    pub(crate) fn calls(&self) -> Vec<(&'static str, Fate)> {
        self.calls.lock().unwrap().clone()
    }

    /// Waits until a call is to be answered.
    pub(crate) async fn hold(&self, call: &'static str) {
        let number = {
            let mut calls = self.calls.lock().unwrap();
            calls.push((call, Fate::Waits));
            calls.len() - 1
        };
        let mut noted = Noted { late: self, number, fate: Fate::GivenUp };
        let next = self.next.lock().unwrap().pop_front();
        match next.unwrap_or(When::Opened) {
            When::Now => {}
            When::After(time) => tokio::time::sleep(time).await,
            When::Opened => drop(self.shut.subscribe().wait_for(|shut| !*shut).await),
        }
        noted.fate = Fate::Answered;
    }
}

/// Notes what became of a call when it is over, also where it is dropped.
struct Noted<'a> {
    late: &'a Late,
    number: usize,
    fate: Fate,
}

impl Drop for Noted<'_> {
    fn drop(&mut self) {
        self.late.calls.lock().unwrap()[self.number].1 = self.fate;
    }
}
