//! Going back, in memory.

use async_trait::async_trait;

use super::{SimMachine, pool_of};
use crate::machine::Fault;
use crate::machine::rollbacks::{Later, Rollbacks};

#[async_trait]
impl Rollbacks for SimMachine {
    async fn rollback(&self, dataset: &str, name: &str, later: Later) -> Result<(), Fault> {
        let pinned = self.pinned.lock().unwrap().clone();
        self.pool_step("rollback".into(), pool_of(dataset), |pool, _| {
            assert!(pool.loaded, "rolled back without its key");
            let place = pool.snapshots.iter().position(|(there, _)| there == name);
            let place = place.ok_or_else(|| Fault::new("could not find any snapshots"))?;
            let mut behind = pool.snapshots[place + 1..].iter();
            match later {
                Later::Kept if behind.len() > 0 => return Err(Fault::new("more recent snapshots or bookmarks exist")),
                Later::Destroyed if behind.any(|(name, _)| pinned.contains(name)) => {
                    return Err(Fault { text: "dataset is busy".into(), busy: true });
                }
                _ => {}
            }
            pool.snapshots.truncate(place + 1);
            pool.data = pool.snapshots[place].1.clone();
            Ok(())
        })
    }

    async fn bookmarks_after(&self, _dataset: &str, _name: &str) -> Result<Vec<String>, Fault> {
        self.look(|_, _| Ok(self.bookmarks.lock().unwrap().clone()))
    }

    async fn written_since(&self, _dataset: &str, _name: &str) -> Result<u64, Fault> {
        self.look(|_, _| Ok(4096))
    }
}
