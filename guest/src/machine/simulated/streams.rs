//! Streams of the simulated machine: it has none, but names of datasets can change.

use async_trait::async_trait;

use super::{SimMachine, pool_of};
use crate::machine::Fault;
use crate::machine::streams::{Inward, Outward, SendPoint, Streams, What};

#[async_trait]
impl Streams for SimMachine {
    async fn send_points(&self, dataset: &str) -> Result<Vec<SendPoint>, Fault> {
        let (pinned, referenced) = (self.pinned.lock().unwrap().clone(), *self.referenced.lock().unwrap());
        self.look(|kernel, disks| {
            let (index, _) = *kernel.imported.get(pool_of(dataset)).ok_or_else(|| Fault::new("no such pool"))?;
            let all = disks[index].pool.as_ref().unwrap().snapshots.iter();
            let point = |(name, data): &(String, String)| SendPoint {
                pinned: pinned.contains(name),
                name: name.clone(),
                // One that is taken again when something else is in it has another.
                guid: name.bytes().chain(data.bytes()).fold(1, |sum: u64, byte| sum % (1 << 56) * 31 + u64::from(byte)),
                created: 0,
                referenced,
                used: 0,
            };
            Ok(all.map(point).collect())
        })
    }

    async fn resume_token(&self, _dataset: &str) -> Result<Option<String>, Fault> {
        self.look(|_, _| Ok(self.resume_token.lock().unwrap().clone()))
    }

    async fn forget_receive(&self, _dataset: &str) -> Result<(), Fault> {
        self.step("forget receive", |_, _| Ok(()))
    }

    async fn estimate(&self, _dataset: &str, _what: &What) -> Result<u64, Fault> {
        self.look(|_, _| Ok(0))
    }

    async fn send(&self, _dataset: &str, _what: &What) -> Result<Outward, Fault> {
        Err(Fault::new("not simulated"))
    }

    async fn receive(&self, _dataset: &str, _new: bool) -> Result<Inward, Fault> {
        Err(Fault::new("not simulated"))
    }

    async fn rename(&self, dataset: &str, to: &str) -> Result<(), Fault> {
        self.pool_step(format!("rename to {to}"), pool_of(dataset), |pool, _| {
            let properties = pool.datasets.remove(dataset).ok_or_else(|| Fault::new("no such dataset"))?;
            pool.datasets.insert(to.into(), properties);
            Ok(())
        })
    }

    async fn destroy(&self, dataset: &str) -> Result<(), Fault> {
        self.pool_step(format!("destroy {dataset}"), pool_of(dataset), |pool, _| {
            pool.datasets.remove(dataset);
            Ok(())
        })
    }
}
