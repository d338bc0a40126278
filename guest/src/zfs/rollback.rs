//! `zfs rollback`, and what it would take.

use super::{DEADLINE, IMPORT_DEADLINE, Tools};
use crate::machine::Fault;
use crate::machine::rollbacks::Later;

impl Tools {
    /// Makes a dataset what it was at a snapshot. `-r`: later snapshots and bookmarks go. `-R`: so does what was cloned from
    /// them; and then holds of theirs, without which they can't.
    pub async fn rollback(&self, dataset: &str, name: &str, later: Later) -> Result<(), Fault> {
        let snapshot = format!("{dataset}@{name}");
        let option = match later {
            Later::Kept => None,
            Later::Destroyed => Some("-r"),
            Later::DestroyedWithClones => Some("-R"),
        };
        let back: Vec<_> = ["rollback"].into_iter().chain(option).chain([snapshot.as_str()]).collect();
        match self.run("zfs", &back, IMPORT_DEADLINE).await {
            Err(fault) if fault.busy && later == Later::DestroyedWithClones => {
                self.release_later(dataset, name).await?;
                self.run("zfs", &back, IMPORT_DEADLINE).await.map(drop)
            }
            done => done.map(drop),
        }
    }

    async fn release_later(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        let all = self.send_points(dataset).await?;
        for later in all.iter().skip_while(|snapshot| snapshot.name != name).skip(1) {
            let snapshot = format!("{dataset}@{}", later.name);
            let holds = self.run("zfs", &["holds", "-H", &snapshot], DEADLINE).await?;
            for hold in String::from_utf8_lossy(&holds).lines() {
                let Some(tag) = hold.split('\t').nth(1) else { continue };
                self.run("zfs", &["release", "--", tag, &snapshot], DEADLINE).await?;
            }
        }
        Ok(())
    }

    /// Bookmarks of a dataset that are later than a snapshot: what stands behind the #.
    pub async fn bookmarks_after(&self, dataset: &str, name: &str) -> Result<Vec<String>, Fault> {
        let arguments = ["list", "-H", "-p", "-t", "snapshot,bookmark", "-d", "1", "-o", "name,createtxg", dataset];
        let output = self.run("zfs", &arguments, DEADLINE).await?;
        Ok(later_bookmarks(&String::from_utf8_lossy(&output), &format!("{dataset}@{name}")))
    }

    /// Bytes that were written since a snapshot.
    pub async fn written_since(&self, dataset: &str, name: &str) -> Result<u64, Fault> {
        let arguments = ["get", "-H", "-p", "-o", "value", &format!("written@{name}"), dataset];
        let output = self.run("zfs", &arguments, DEADLINE).await?;
        let text = String::from_utf8_lossy(&output);
        text.trim().parse().map_err(|_| Fault::new("zfs get written@ is no number"))
    }
}

/// Reads names and transaction groups. A bookmark of the snapshot itself has its group, and is not later.
fn later_bookmarks(list: &str, snapshot: &str) -> Vec<String> {
    let entries = || list.lines().filter_map(|line| line.split_once('\t'));
    let group = |text: &str| text.trim().parse::<u64>().ok();
    let Some(since) = entries().find(|(name, _)| *name == snapshot).and_then(|(_, txg)| group(txg)) else {
        return Vec::new();
    };
    let later = entries().filter(|(_, txg)| group(txg).is_some_and(|txg| txg > since));
    later.filter_map(|(name, _)| Some(name.split_once('#')?.1.to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bookmarks_of_later_snapshots_are_later_and_no_snapshot_is_a_bookmark() {
        let list = "p/data@a\t10\np/data@b\t20\np/data#a\t10\np/data#b\t20\np/data#old\t5\nnonsense\n";
        assert_eq!(later_bookmarks(list, "p/data@a"), ["b"]);
        assert!(later_bookmarks(list, "p/data@b").is_empty() && later_bookmarks(list, "p/data@c").is_empty());
    }
}
