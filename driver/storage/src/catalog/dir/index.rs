//! Which records there are, in the order of their ids.

use std::collections::BTreeMap;
use std::ops::Bound;

/// What is known of a record without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// Its revision.
    Revision(u64),
    /// It could not be read.
    Damaged,
}

/// Ids and revisions of all records.
#[derive(Debug)]
pub(super) struct Index<Id>(BTreeMap<Id, Known>);

impl<Id> Default for Index<Id> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<Id: Ord + Copy> Index<Id> {
    pub(super) fn get(&self, id: Id) -> Option<Known> {
        self.0.get(&id).copied()
    }

    pub(super) fn set(&mut self, id: Id, known: Known) {
        self.0.insert(id, known);
    }

    pub(super) fn remove(&mut self, id: Id) {
        self.0.remove(&id);
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Up to `limit` ids from `from` on, and the one behind them.
    pub(super) fn page(&self, from: Option<Id>, limit: usize) -> (Vec<Id>, Option<Id>) {
        let from = from.map_or(Bound::Unbounded, Bound::Included);
        let mut behind = self.0.range((from, Bound::Unbounded)).map(|(id, _)| *id);
        let ids = behind.by_ref().take(limit).collect();
        (ids, behind.next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_volume::VolumeId;

    #[test]
    fn pages_join_without_gap_or_overlap() {
        let mut index = Index::default();
        let mut ids: Vec<_> = (0..25).map(|n| VolumeId::from_name(&n.to_string())).collect();
        ids.iter().for_each(|id| index.set(*id, Known::Revision(1)));
        ids.sort();
        let (mut from, mut seen) = (None, Vec::new());
        loop {
            let (page, next) = index.page(from, 7);
            seen.extend(page);
            from = next;
            if from.is_none() {
                break;
            }
        }
        assert_eq!(seen, ids);
        assert_eq!(index.page(None, 25), (ids.clone(), None));
        assert_eq!(index.page(None, 0), (vec![], Some(ids[0])));
    }
}
