//! Faults that are known and being mended. What they make fail is not tried until then.

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weakness {
    /// Nothing works on a file system that is full.
    FullDisk,
    /// Nothing works on a file system that can't be written to.
    ReadOnlyDisk,
    /// Target paths are compared as text.
    TwoNamesOfAPath,
}

/// To become empty.
const KNOWN: &[Weakness] = &[Weakness::FullDisk, Weakness::ReadOnlyDisk, Weakness::TwoNamesOfAPath];

/// Whether something is tried.
pub(crate) fn allows(weakness: Weakness) -> bool {
    !KNOWN.contains(&weakness)
}
