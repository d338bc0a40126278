//! What there is in the simulated backing.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;

use zpod_volume::{SnapshotId, VolumeId};

use crate::backing::kept::Kept;
use crate::backing::ledger::Ledger;

#[derive(Debug)]
pub(super) struct State {
    pub(super) devices: HashMap<VolumeId, Device>,
    pub(super) copies: HashMap<SnapshotId, Copied>,
    pub(super) ledger: Ledger,
    pub(super) size: u64,
    /// The longest disk there can be.
    pub(super) longest: u64,
    /// Whether copies share blocks.
    pub(super) shares: bool,
    /// Pieces written so far: the number of the last one.
    pub(super) pieces: u64,
    /// Calls still to come before the one that fails, and how it fails.
    pub(super) fault: Option<(u64, io::ErrorKind)>,
    pub(super) calls: u64,
}

#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) disk: u64,
    /// Taken in advance.
    pub(super) thick: u64,
    pub(super) contents: Contents,
    pub(super) table: u64,
    pub(super) note: Vec<u8>,
    pub(super) openers: usize,
    pub(super) proofs: usize,
}

/// What a snapshot keeps.
#[derive(Debug)]
pub(super) struct Copied {
    /// Up to here.
    pub(super) end: u64,
    pub(super) contents: Contents,
}

/// What was written, by where it begins.
pub(super) type Contents = BTreeMap<u64, Piece>;

/// What one write has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it is on the disk: the same in all that share it.
    pub(super) number: u64,
    /// What it is: the same in every copy.
    pub(super) contents: u64,
    pub(super) bytes: u64,
}

/// What it takes.
pub(super) fn bytes_in(contents: &Contents) -> u64 {
    contents.values().map(|piece| piece.bytes).sum()
}

impl Device {
    pub(super) fn taken(&self) -> u64 {
        bytes_in(&self.contents).max(self.thick)
    }
}

impl State {
    pub(super) fn contents(&self, kept: Kept) -> Option<&Contents> {
        match kept {
            Kept::Volume(id) => self.devices.get(&id).map(|device| &device.contents),
            Kept::Snapshot(id) => self.copies.get(&id).map(|copied| &copied.contents),
        }
    }

    pub(super) fn taken(&self, kept: Kept) -> u64 {
        match kept {
            Kept::Volume(id) => self.devices.get(&id).map_or(0, Device::taken),
            Kept::Snapshot(id) => self.copies.get(&id).map_or(0, |copied| bytes_in(&copied.contents)),
        }
    }

    pub(super) fn free(&self) -> u64 {
        let copies = self.copies.values().map(|copied| &copied.contents);
        let all = self.devices.values().map(|device| &device.contents).chain(copies);
        let pieces: HashMap<u64, u64> =
            all.flat_map(|contents| contents.values()).map(|piece| (piece.number, piece.bytes)).collect();
        let thick = self.devices.values().map(|device| device.taken() - bytes_in(&device.contents)).sum::<u64>();
        self.size.saturating_sub(pieces.values().sum::<u64>() + thick)
    }

    /// Nothing is hidden here: who shares what is known at once.
    pub(super) fn measure(&mut self) {
        let mut seen = HashSet::new();
        let mut found = self.ledger.promises();
        found.retain(|promised| promised.whole);
        let found: Vec<_> = found
            .into_iter()
            .map(|promised| {
                let pieces = self.contents(promised.kept).into_iter().flat_map(|contents| contents.values());
                (promised, pieces.filter(|piece| !seen.insert(piece.number)).map(|piece| piece.bytes).sum())
            })
            .collect();
        self.ledger.refined(&found);
        let promises = self.ledger.promises();
        let taken: Vec<u64> = promises.iter().map(|promised| self.taken(promised.kept)).collect();
        let free = self.free();
        self.ledger.measured(free, &promises, &taken);
    }
}
