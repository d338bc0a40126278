//! Faults that are known and being mended. What they make fail is not tried until then.

/// A kind of fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Weakness {
    /// Nothing works on a file system that is full.
    FullDisk,
    /// Nothing works on a file system that can't be written to.
    ReadOnlyDisk,
    /// Nothing works on a `/run` that is full.
    FullRun,
    /// Target paths are compared as text.
    TwoNamesOfAPath,
}

/// To become empty.
const KNOWN: &[Weakness] = &[Weakness::FullRun, Weakness::ReadOnlyDisk];

/// Whether something is tried.
pub(crate) fn allows(weakness: Weakness) -> bool {
    !KNOWN.contains(&weakness)
}
