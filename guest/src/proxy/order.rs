//! Calls for one container, one after the other, in the order in which they came.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;

/// Who is last in the queue of each container.
#[derive(Debug, Default)]
pub(super) struct Order(Mutex<HashMap<String, oneshot::Receiver<()>>>);

/// A place in a container's queue. Whoever is behind waits until it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    before: Option<oneshot::Receiver<()>>,
    _done: oneshot::Sender<()>,
}

impl Order {
    /// Takes the next place.
    pub(super) fn enter(&self, container: &str) -> Turn {
        let (done, next) = oneshot::channel();
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|_, turn| turn.try_recv() == Err(TryRecvError::Empty));
        Turn { before: last.insert(container.to_owned(), next), _done: done }
    }
}

impl Turn {
    /// Waits for everybody before.
    pub(super) async fn come(&mut self) {
        if let Some(before) = self.before.take() {
            // Ends with an error when the one before is dropped, which is what is waited for.
            let _ = before.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn turns_come_in_order_and_containers_dont_wait_for_each_other() {
        let order = Order::default();
        let (mut first, mut second, mut third) = (order.enter("a"), order.enter("a"), order.enter("a"));
        first.come().await;
        order.enter("b").come().await;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (one, two) = (Arc::clone(&seen), Arc::clone(&seen));
        let third = tokio::spawn(async move {
            third.come().await;
            one.lock().unwrap().push(3);
        });
        let second = tokio::spawn(async move {
            second.come().await;
            two.lock().unwrap().push(2);
        });
        tokio::task::yield_now().await;
        assert!(seen.lock().unwrap().is_empty());
        drop(first);
        second.await.unwrap();
        third.await.unwrap();
        assert_eq!(*seen.lock().unwrap(), [2, 3]);
    }
}
