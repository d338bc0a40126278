//! What may be done with the two halves of a mirror, decided from what is on them. Pure.

use zpod_volume::{Create, Half};

use crate::journal::Journal;

/// What is on a half that can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) journal: Journal,
    /// The places of ZFS's labels were never written to.
    pub(super) blank: bool,
}

impl Seen {
    /// Nothing on it was ever of use to a container.
    const fn is_worthless(self) -> bool {
        matches!((self.journal, self.blank), (Journal::Creating, _) | (Journal::Blank, true))
    }

    /// It may be given what the other half has, whatever it holds.
    pub(super) const fn may_be_rebuilt(self) -> bool {
        matches!((self.journal, self.blank), (Journal::Rebuilding, _) | (Journal::Blank, true))
    }
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plan {
    /// The pool is made, on two halves that were never used.
    Make,
    /// The making of the pool, which was cut short, is finished, or begun anew.
    Resume {
        /// There are labels that may be those of a pool.
        labels: bool,
    },
    /// The pool is imported. These halves have everything.
    Import(Complete),
    /// It is imported already.
    Keep,
}

/// Which halves have everything there is, as far as is known before ZFS was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Complete(pub(super) [bool; 2]);

/// Why nothing is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("neither half of its disk can be used")]
    Nothing,
    #[error(
        "its pool was never finished, and one half of its disk can't be used: a mirror is made on two halves or not \
             at all"
    )]
    HalfMade,
    #[error(
        "the half of its disk that has everything can't be used, and the other one lacks some of it: nothing was \
         imported, since what was written last would seem never to have been; bring the lost disk back. If it is gone for \
         good, the other half's image still has what was there before"
    )]
    Incomplete,
    #[error("its disk is blank, but the volume is recorded as in use since before; nothing was formatted")]
    Blank,
    #[error(
        "what is on its disk is not known: neither half says that it has everything, and they don't both say that they \
         were never used; nothing was changed"
    )]
    Unknown,
}

/// Decides. `None` stands for a half that can't be used.
///
/// A pool is made only where **both** halves can be read and neither ever held anything, and imported only where a half
/// is there that has everything: one whose journal says so, and of which the node does not know better.
pub(super) fn plan(
    seen: [Option<Seen>; 2],
    create: Create,
    behind: Option<Half>,
    imported: bool,
) -> Result<Plan, Refusal> {
    let says = |half: Half, journal| seen[half.index()].is_some_and(|seen| seen.journal == journal);
    let created = Half::BOTH.map(|half| says(half, Journal::Created));
    if imported {
        // In this very kernel, from halves that were looked at then. What was being made has no user yet.
        let unfinished = Half::BOTH.iter().any(|half| says(*half, Journal::Creating)) && created == [false; 2];
        return match (unfinished, seen) {
            (true, [Some(_), Some(_)]) => Ok(Plan::Resume { labels: true }),
            (true, _) => Err(Refusal::HalfMade),
            (false, [None, None]) => Err(Refusal::Nothing),
            (false, _) => Ok(Plan::Keep),
        };
    }
    if created != [false; 2] {
        let complete = Half::BOTH.map(|half| created[half.index()] && behind != Some(half));
        return if complete == [false; 2] { Err(Refusal::Incomplete) } else { Ok(Plan::Import(Complete(complete))) };
    }
    let [Some(first), Some(second)] = seen else {
        return Err(match seen.iter().flatten().next() {
            None => Refusal::Nothing,
            Some(seen) if seen.is_worthless() && behind.is_none() && create != Create::Never => Refusal::HalfMade,
            Some(_) => Refusal::Incomplete,
        });
    };
    let lacking = |seen: Seen| matches!(seen.journal, Journal::Behind | Journal::Rebuilding);
    if lacking(first) || lacking(second) || behind.is_some() {
        return Err(Refusal::Incomplete);
    }
    if !first.is_worthless() || !second.is_worthless() {
        return Err(Refusal::Unknown);
    }
    match (first.journal, second.journal, create) {
        (Journal::Blank, Journal::Blank, Create::Fresh) => Ok(Plan::Make),
        (Journal::Blank, Journal::Blank, _) => Err(Refusal::Blank),
        _ => Ok(Plan::Resume { labels: !(first.blank && second.blank) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOURNALS: [Journal; 6] =
        [Journal::Blank, Journal::Creating, Journal::Created, Journal::Behind, Journal::Rebuilding, Journal::Foreign];

    fn all() -> Vec<([Option<Seen>; 2], Create, Option<Half>)> {
        let one = || {
            let there =
                JOURNALS.into_iter().flat_map(|journal| [true, false].map(|blank| Some(Seen { journal, blank })));
            there.chain([None])
        };
        let mut all = Vec::new();
        for (first, second) in one().flat_map(|first| one().map(move |second| (first, second))) {
            for create in [Create::Fresh, Create::Resume, Create::Never] {
                for behind in [None, Some(Half::First), Some(Half::Second)] {
                    all.push(([first, second], create, behind));
                }
            }
        }
        all
    }

    #[test]
    fn a_pool_is_made_only_on_two_halves_that_never_held_anything() {
        for (seen, create, behind) in all() {
            let plan = plan(seen, create, behind, false);
            if matches!(plan, Ok(Plan::Make | Plan::Resume { .. })) {
                let both = seen.iter().all(|seen| seen.is_some_and(Seen::is_worthless));
                assert!(both && behind.is_none(), "{seen:?} {create:?} {behind:?}");
            }
            if plan == Ok(Plan::Make) {
                let blank = Some(Seen { journal: Journal::Blank, blank: true });
                assert!(create == Create::Fresh && seen == [blank; 2], "{seen:?} {create:?}");
            }
        }
    }

    #[test]
    fn a_pool_is_imported_only_where_a_half_has_everything() {
        let mut imports = 0;
        for (seen, create, behind) in all() {
            let Ok(Plan::Import(Complete(complete))) = plan(seen, create, behind, false) else { continue };
            imports += 1;
            assert!(complete.contains(&true));
            for half in Half::BOTH.into_iter().filter(|half| complete[half.index()]) {
                let there = seen[half.index()].is_some_and(|seen| seen.journal == Journal::Created);
                assert!(there && behind != Some(half), "{seen:?} {create:?} {behind:?}");
            }
        }
        assert!(imports > 0);
    }

    #[test]
    fn every_other_case_has_its_reason() {
        let seen = |journal, blank| Some(Seen { journal, blank });
        let created = seen(Journal::Created, false);
        for (halves, create, behind, want) in [
            ([None, None], Create::Fresh, None, Err(Refusal::Nothing)),
            ([seen(Journal::Blank, true), None], Create::Fresh, None, Err(Refusal::HalfMade)),
            ([seen(Journal::Blank, true), None], Create::Never, None, Err(Refusal::Incomplete)),
            ([seen(Journal::Blank, true); 2], Create::Resume, None, Err(Refusal::Blank)),
            ([seen(Journal::Blank, true), seen(Journal::Creating, false)], Create::Resume, None, {
                Ok(Plan::Resume { labels: true })
            }),
            ([seen(Journal::Blank, false), seen(Journal::Creating, false)], Create::Fresh, None, Err(Refusal::Unknown)),
            ([seen(Journal::Foreign, true), seen(Journal::Blank, true)], Create::Fresh, None, Err(Refusal::Unknown)),
            ([created, None], Create::Never, Some(Half::First), Err(Refusal::Incomplete)),
            ([created, None], Create::Never, Some(Half::Second), Ok(Plan::Import(Complete([true, false])))),
            ([seen(Journal::Behind, false), None], Create::Never, None, Err(Refusal::Incomplete)),
            ([seen(Journal::Rebuilding, false), seen(Journal::Behind, false)], Create::Never, None, {
                Err(Refusal::Incomplete)
            }),
            ([created, created], Create::Never, None, Ok(Plan::Import(Complete([true, true])))),
            ([created, seen(Journal::Creating, false)], Create::Fresh, None, {
                Ok(Plan::Import(Complete([true, false])))
            }),
        ] {
            assert_eq!(plan(halves, create, behind, false), want, "{halves:?} {create:?} {behind:?}");
        }
    }

    #[test]
    fn what_is_imported_is_kept_and_what_was_being_made_is_finished_on_both() {
        let seen = |journal| Some(Seen { journal, blank: false });
        let (creating, created) = (seen(Journal::Creating), seen(Journal::Created));
        for (halves, want) in [
            ([created, created], Ok(Plan::Keep)),
            ([created, creating], Ok(Plan::Keep)),
            ([created, None], Ok(Plan::Keep)),
            ([creating, creating], Ok(Plan::Resume { labels: true })),
            ([creating, None], Err(Refusal::HalfMade)),
            ([None, None], Err(Refusal::Nothing)),
        ] {
            assert_eq!(plan(halves, Create::Never, None, true), want, "{halves:?}");
        }
    }
}
