use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use crate::kata::Sandbox;

/// Sandboxes that are listened to though they have shown no volume. What each of them can make this process hold is
/// bounded, so this bounds what all of them can.
pub(super) const WITHOUT_VOLUME: usize = 64;
/// How long one of them is listened to while others wait for its place: longer than it takes to find that a guest does not
/// answer. With 110 pods on a node each has its turn every 20 s.
pub(super) const TURN: Duration = Duration::from_secs(10);

/// Whose guests are to be heard.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Sandboxes that have shown the token of a publication, by their ids.
    pub owners: HashSet<String>,
    /// There while a publication waits for its sandbox: the last scan that had ended when it was made. kubelet publishes
    /// the volumes of a pod before it makes the pod's sandbox, so what that scan has found is another pod's.
    pub waiting_since: Option<u64>,
}

/// Which sandboxes are listened to.
///
/// # Design
/// Those that have a volume, and while a publication waits for its sandbox, those that may be it: [`WITHOUT_VOLUME`] at a time,
/// in the order in which they came. Where there are more, whoever has had its [`TURN`] makes room and comes last. So
/// whoever starts many sandboxes can't keep that of another tenant from being heard, only let it wait.
#[derive(Debug, Default)]
pub(super) struct Turns {
    places: HashMap<Sandbox, Place>,
    /// The end of the queue.
    last: u64,
}

#[derive(Debug)]
struct Place {
    first_seen: u64,
    /// Its place in the queue.
    queued: u64,
    /// Since when it has its turn.
    turn: Option<Instant>,
    /// It was listened to before.
    again: bool,
}

impl Turns {
    /// Notes what a scan has found. Gives those that are gone.
    pub(super) fn found(&mut self, scan: u64, found: &[Sandbox]) -> Vec<Sandbox> {
        let there: HashSet<_> = found.iter().collect();
        let gone = self.places.extract_if(|sandbox, _| !there.contains(sandbox)).map(|(sandbox, _)| sandbox).collect();
        for sandbox in found {
            if !self.places.contains_key(sandbox) {
                tracing::debug!(sandbox = sandbox.id, "new sandbox");
                self.last += 1;
                let place = Place { first_seen: scan, queued: self.last, turn: None, again: false };
                self.places.insert(sandbox.clone(), place);
            }
        }
        gone
    }

    /// Who is to be listened to from now on, and whether each was before.
    pub(super) fn choose(&mut self, wanted: &Wanted, now: Instant) -> HashMap<Sandbox, bool> {
        let (mut chosen, mut have, mut wait) = (HashMap::new(), Vec::new(), Vec::new());
        for (sandbox, place) in &mut self.places {
            let stranger = !wanted.owners.contains(&sandbox.id);
            let may_be_it = stranger && wanted.waiting_since.is_some_and(|scan| place.first_seen > scan);
            match place.turn.filter(|_| may_be_it) {
                Some(began) => have.push((began, sandbox, place)),
                None => {
                    place.turn = None;
                    if may_be_it {
                        wait.push((place.queued, sandbox, place));
                    } else if !stranger {
                        chosen.insert(sandbox.clone(), std::mem::replace(&mut place.again, true));
                    }
                }
            }
        }
        have.sort_by_key(|(began, ..)| *began);
        wait.sort_by_key(|(queued, ..)| *queued);
        let mut short = (have.len() + wait.len()).saturating_sub(WITHOUT_VOLUME);
        have.retain_mut(|(began, _, place)| {
            let ends = short > 0 && now.duration_since(*began) >= TURN;
            if ends {
                short -= 1;
                self.last += 1;
                (place.turn, place.queued) = (None, self.last);
            }
            !ends
        });
        let free = WITHOUT_VOLUME.saturating_sub(have.len());
        let next = wait.into_iter().take(free).map(|(_, sandbox, place)| {
            place.turn = Some(now);
            (sandbox.clone(), std::mem::replace(&mut place.again, true))
        });
        chosen.extend(next);
        chosen.extend(have.into_iter().map(|(_, sandbox, _)| (sandbox.clone(), true)));
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(id: &str) -> Sandbox {
        Sandbox { id: id.into(), socket: "/nowhere".into(), inode: 1 }
    }

    fn many(count: usize) -> Vec<Sandbox> {
        (0..count).map(|number| sandbox(&format!("hostile-{number}"))).collect()
    }

    fn wanted(owners: &[&str], waiting_since: Option<u64>) -> Wanted {
        Wanted { owners: owners.iter().map(|id| (*id).to_owned()).collect(), waiting_since }
    }

    fn ids(chosen: &HashMap<Sandbox, bool>) -> Vec<&str> {
        let mut ids: Vec<_> = chosen.keys().map(|sandbox| sandbox.id.as_str()).collect();
        ids.sort_unstable();
        ids
    }

    #[test]
    fn those_with_a_volume_are_heard_and_others_only_while_a_publication_waits_that_is_older() {
        let (mut turns, now) = (Turns::default(), Instant::now());
        assert!(turns.found(1, &[sandbox("a"), sandbox("b")]).is_empty());
        turns.found(2, &[sandbox("a"), sandbox("b"), sandbox("c")]);
        for (owners, since, want) in [
            (&[][..], None, &[][..]),
            (&[], Some(0), &["a", "b", "c"]),
            (&[], Some(1), &["c"]),
            (&[], Some(2), &[]),
            (&["a"], None, &["a"]),
            (&["a"], Some(1), &["a", "c"]),
            (&["c"], Some(2), &["c"]),
        ] {
            assert_eq!(ids(&turns.choose(&wanted(owners, since), now)), want, "{owners:?} {since:?}");
        }
        let another = Sandbox { inode: 2, ..sandbox("a") };
        assert_eq!(turns.found(3, std::slice::from_ref(&another)).len(), 3, "another one at the same place");
        assert_eq!(ids(&turns.choose(&wanted(&[], Some(2)), now)), ["a"]);
    }

    #[test]
    fn a_tenant_with_many_sandboxes_lets_others_wait_for_a_turn_and_no_longer() {
        let (mut turns, mut now, mut found) = (Turns::default(), Instant::now(), many(1000));
        turns.found(1, &found);
        let wants = wanted(&[], Some(0));
        assert_eq!(turns.choose(&wants, now).len(), WITHOUT_VOLUME);
        found.push(sandbox("victim"));
        turns.found(2, &found);
        let (begin, mut heard) = (now, HashSet::new());
        while !heard.contains("victim") {
            now += Duration::from_secs(1);
            // And it goes on making others.
            found.push(sandbox(&format!("more-{}", found.len())));
            turns.found(3, &found);
            let chosen = turns.choose(&wants, now);
            assert_eq!(chosen.len(), WITHOUT_VOLUME);
            heard.extend(chosen.into_keys().map(|sandbox| sandbox.id));
            assert!(now - begin <= TURN * (1000 / WITHOUT_VOLUME as u32 + 1), "{:?}", now - begin);
        }
        assert!(heard.len() >= 1000, "nobody was passed over: {}", heard.len());
    }

    #[test]
    fn who_has_its_turn_keeps_it_while_nobody_waits_and_who_shows_a_volume_gives_the_place_away() {
        let (mut turns, begin, mut found) = (Turns::default(), Instant::now(), many(WITHOUT_VOLUME));
        turns.found(1, &found);
        let first = turns.choose(&wanted(&[], Some(0)), begin);
        assert!(first.values().all(|again| !again));
        let later = turns.choose(&wanted(&[], Some(0)), begin + 100 * TURN);
        assert_eq!(ids(&first), ids(&later));
        found.push(sandbox("new"));
        turns.found(2, &found);
        let chosen = turns.choose(&wanted(&["hostile-0"], Some(0)), begin + 100 * TURN);
        assert_eq!(chosen.len(), WITHOUT_VOLUME + 1, "all that were heard, and the new one");
        assert_eq!((chosen[&sandbox("hostile-0")], chosen[&sandbox("new")]), (true, false));
    }
}
