//! Plain data, made of objects: what `-o json` shows. Fields are added, never renamed or taken away.

mod snapshot;
mod tree;
mod volume;

pub(crate) use snapshot::SnapshotView;
pub(crate) use tree::{Node, tree_of};
pub(crate) use volume::{VolumeView, sort};
