//! Who has an image open for a moment.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::backing::kept::Kept;

/// Images that are open for a look, or about to be leased: neither shall meet the other. One for each image: who waits
/// waits for one step of looking at that image.
#[derive(Debug, Default)]
pub(super) struct Openings {
    open: Mutex<HashSet<Kept>>,
    closed: Condvar,
}

/// One that is open.
pub(super) struct Opening<'a>(&'a Openings, Kept);

impl Openings {
    /// Waits until nobody else has it open so.
    pub(super) fn enter(&self, kept: Kept) -> Opening<'_> {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.closed.wait_while(open, |open| open.contains(&kept));
        waited.unwrap_or_else(PoisonError::into_inner).insert(kept);
        Opening(self, kept)
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.1);
        self.0.closed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_volume::VolumeId;

    #[test]
    fn one_image_is_open_once_and_others_do_not_wait() {
        let (openings, [a, b]) = (Openings::default(), ["a", "b"].map(|name| Kept::from(VolumeId::from_name(name))));
        let (told, heard) = std::sync::mpsc::channel();
        let first = openings.enter(a);
        drop(openings.enter(b));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _second = openings.enter(a);
                told.send("second").unwrap();
            });
            // Whichever way the threads run, the first is done before the second begins.
            assert!(heard.try_recv().is_err());
            drop(first);
            assert_eq!(heard.recv().unwrap(), "second");
        });
    }
}
