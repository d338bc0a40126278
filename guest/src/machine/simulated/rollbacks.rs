//! Going back, in memory.

use async_trait::async_trait;

use super::{Amiss, SimMachine, pool_of};
use crate::machine::Fault;
use crate::machine::rollbacks::{Later, Rollbacks};

#[async_trait]
impl Rollbacks for SimMachine {
    async fn rollback(&self, dataset: &str, name: &str, later: Later) -> Result<(), Fault> {
        let (pinned, amiss) = (self.pinned.lock().unwrap().clone(), *self.amiss.lock().unwrap());
        let referenced = *self.referenced.lock().unwrap();
        self.pool_step("rollback".into(), pool_of(dataset), |pool, _| {
            assert!(pool.loaded, "rolled back without its key");
            let given_up = || Fault { given_up: true, ..Fault::new("given up") };
            if amiss == Some(Amiss::GivenUp) {
                return Err(given_up());
            }
            let place = pool.snapshots.iter().position(|(there, _)| there == name);
            let place = place.ok_or_else(|| Fault::new("could not find any snapshots"))?;
            let mut behind = pool.snapshots[place + 1..].iter();
            match later {
                Later::Kept if behind.len() > 0 => return Err(Fault::new("more recent snapshots or bookmarks exist")),
                Later::Destroyed if behind.any(|(name, _)| pinned.contains(name)) => {
                    return Err(Fault { busy: true, ..Fault::new("dataset is busy") });
                }
                _ => {}
            }
            // As the tool does it: first these, one by one, and then what may still be refused.
            pool.snapshots.truncate(place + 1);
            let bound = pool.datasets[dataset].get("refquota").and_then(|bytes| bytes.parse().ok());
            if bound.is_some_and(|bound: u64| bound > 0 && bound < referenced) {
                return Err(Fault::new("cannot rollback: Disk quota exceeded"));
            }
            if amiss == Some(Amiss::HalfWay) {
                return Err(Fault::new("cannot rollback: dataset is in use"));
            }
            pool.data = pool.snapshots[place].1.clone();
            if amiss == Some(Amiss::GivenUpDone) { Err(given_up()) } else { Ok(()) }
        })
    }

    async fn bookmarks_after(&self, _dataset: &str, _name: &str) -> Result<Vec<String>, Fault> {
        self.look(|_, _| Ok(self.bookmarks.lock().unwrap().clone()))
    }

    async fn written_since(&self, dataset: &str, name: &str) -> Result<u64, Fault> {
        self.look(|kernel, disks| {
            let (index, _) = *kernel.imported.get(pool_of(dataset)).ok_or_else(|| Fault::new("no such pool"))?;
            let pool = disks[index].pool.as_ref().unwrap();
            let then = pool.snapshots.iter().find(|(there, _)| there == name);
            let (_, then) = then.ok_or_else(|| Fault::new("no such snapshot"))?;
            Ok(if *then == pool.data { 0 } else { 4096 })
        })
    }
}
