use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::runtime::controller::Action;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};

use crate::volumes::VolumeError;

/// How long an object that is worked on keeps one of the controller's places.
const HOLD: Duration = Duration::from_secs(2);
/// When an object that is worked on is looked at again ...
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// ... and later by this for each that comes before it, up to a minute.
const LATER_EACH: Duration = Duration::from_millis(100);
const LATER_AT_MOST: Duration = Duration::from_secs(60);
/// What came of an object that nobody looks at any more is forgotten after this.
const KEPT: Duration = Duration::from_secs(600);

/// The work on objects, one queue for each volume.
///
/// # Design
/// kube's controller works on a few objects at a time, and what is done for one waits for the lock of its volume and for
/// the volume's guest: for as long as a tenant likes, up to the deadlines. So the work is a task of its own, and an object
/// keeps its place of the controller for [`HOLD`] only. Work on objects of one volume is done one after the other, without
/// a place and without waiting for the volume's lock more than once.
#[derive(Debug, Default)]
pub(super) struct Queues(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// By volume. There while something of the volume is worked on.
    queues: HashMap<String, Queue>,
    /// By object: what came of it, until it is looked at again.
    ended: HashMap<String, Ended>,
}

#[derive(Debug)]
struct Queue {
    running: String,
    waiting: VecDeque<Waiting>,
}

struct Waiting {
    object: Version,
    work: Work,
}

type Work = Pin<Box<dyn Future<Output = Answer> + Send>>;
type Answer = Result<Action, VolumeError>;

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.object.fmt(f)
    }
}

/// An object as somebody has asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) name: String,
    pub(super) generation: Option<i64>,
}

#[derive(Debug)]
struct Ended {
    generation: Option<i64>,
    answer: Answer,
    at: Instant,
}

impl Queues {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has work done for an object of a volume, once for each version of it that is looked at. Gives what came of it, or
    /// when to look again.
    pub(super) async fn work(
        self: &Arc<Self>,
        volume: String,
        object: Version,
        work: impl Future<Output = Answer> + Send + 'static,
    ) -> Answer {
        let done = {
            let mut inner = self.inner();
            match inner.ended.remove(&object.name) {
                // Of another version: what is asked for now is to be done.
                Some(ended) if ended.generation == object.generation => return ended.answer,
                _ => {}
            }
            match inner.queues.get_mut(&volume) {
                Some(queue) if queue.running == object.name => return Ok(Action::requeue(LOOK_AGAIN)),
                Some(queue) => return Ok(Action::requeue(queue.enter(object, Box::pin(work)))),
                None => {
                    let queue = Queue { running: object.name.clone(), waiting: VecDeque::new() };
                    inner.queues.insert(volume.clone(), queue);
                }
            }
            let (sender, done) = oneshot::channel();
            tokio::spawn(self.clone().run(volume, Waiting { object: object.clone(), work: Box::pin(work) }, sender));
            done
        };
        // What takes longer goes on by itself.
        let _ = timeout(HOLD, done).await;
        match self.inner().ended.remove(&object.name) {
            Some(ended) => ended.answer,
            None => Ok(Action::requeue(LOOK_AGAIN)),
        }
    }

    /// Works until nothing waits for this volume any more.
    async fn run(self: Arc<Self>, volume: String, first: Waiting, first_done: oneshot::Sender<()>) {
        let (mut next, mut tell) = (Some(first), Some(first_done));
        while let Some(Waiting { object, work }) = next {
            let answer = match tokio::spawn(work).await {
                Ok(answer) => answer,
                Err(error) => Err(VolumeError::CutShort(error.to_string())),
            };
            next = self.inner().end(&volume, object, answer);
            if let Some(tell) = tell.take() {
                let _ = tell.send(());
            }
        }
    }
}

impl Queue {
    /// Takes a place behind the others, or keeps the one that the object has. Gives when to look again.
    fn enter(&mut self, object: Version, work: Work) -> Duration {
        let place = match self.waiting.iter_mut().position(|waiting| waiting.object.name == object.name) {
            Some(place) => {
                self.waiting[place] = Waiting { object, work };
                place
            }
            None => {
                self.waiting.push_back(Waiting { object, work });
                self.waiting.len() - 1
            }
        };
        let later = LATER_EACH.saturating_mul(u32::try_from(place).unwrap_or(u32::MAX));
        LOOK_AGAIN + later.min(LATER_AT_MOST)
    }
}

impl Inner {
    /// Notes what came of an object, and gives the next one of its volume.
    fn end(&mut self, volume: &str, object: Version, answer: Answer) -> Option<Waiting> {
        let at = Instant::now();
        self.ended.retain(|_, ended| at.duration_since(ended.at) < KEPT);
        self.ended.insert(object.name, Ended { generation: object.generation, answer, at });
        let queue = self.queues.get_mut(volume)?;
        match queue.waiting.pop_front() {
            Some(next) => {
                queue.running.clone_from(&next.object.name);
                Some(next)
            }
            None => {
                self.queues.remove(volume);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::StreamExt as _;
    use futures_util::stream;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::CONCURRENCY;

    fn version(name: impl Into<String>, generation: i64) -> Version {
        Version { name: name.into(), generation: Some(generation) }
    }

    fn done() -> Answer {
        Ok(Action::await_change())
    }

    /// Looks at an object as kube's controller does: again when it is told to.
    async fn settle(queues: &Arc<Queues>, volume: &str, object: Version, work: impl Fn() -> Work) -> Answer {
        loop {
            match queues.work(volume.into(), object.clone(), work()).await {
                Ok(action) if action == Action::await_change() => return Ok(action),
                // Which it says by a time only.
                Ok(_) => tokio::time::sleep(LOOK_AGAIN).await,
                Err(error) => return Err(error),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_volume_goes_on_beside_as_many_slow_ones_as_there_are_places() {
        let queues = Arc::new(Queues::default());
        let places = usize::from(CONCURRENCY);
        // The objects of 16 volumes whose guests never answer, four of each, then the victim's.
        let hostile = (0..4 * places).map(|n| (format!("hostile-{}", n % places), format!("object-{n}")));
        let all = hostile.chain([("victim".to_owned(), "the victim's".to_owned())]);
        let looks = stream::iter(all).map(|(volume, name)| {
            let work: Work =
                if volume == "victim" { Box::pin(async { done() }) } else { Box::pin(std::future::pending()) };
            let queues = queues.clone();
            async move { (volume == "victim", queues.work(volume, version(name, 1), work).await) }
        });
        let looked: Vec<_> = looks.buffer_unordered(places).collect().await;
        let victim: Vec<_> = looked.iter().filter(|(victim, _)| *victim).collect();
        assert!(matches!(victim[..], [(_, Ok(action))] if *action == Action::await_change()), "{victim:?}");
        assert_eq!(queues.inner().queues.len(), places, "and the slow ones are still at it");
    }

    #[tokio::test(start_paused = true)]
    async fn objects_of_one_volume_are_worked_on_one_after_the_other_and_none_is_left_out() {
        let (queues, now, worked) = (Arc::new(Queues::default()), Arc::new(AtomicUsize::new(0)), Arc::default());
        let settled = stream::iter(0..50).map(|n| {
            let (queues, now, worked): (_, _, Arc<AtomicUsize>) = (queues.clone(), now.clone(), Arc::clone(&worked));
            async move {
                let work = || -> Work {
                    let (now, worked) = (now.clone(), worked.clone());
                    Box::pin(async move {
                        assert_eq!(now.fetch_add(1, Ordering::SeqCst), 0, "alone with its volume");
                        tokio::time::sleep(Duration::from_secs(5)).await;
                        now.fetch_sub(1, Ordering::SeqCst);
                        worked.fetch_add(1, Ordering::SeqCst);
                        done()
                    })
                };
                settle(&queues, "a", version(format!("object-{n}"), 1), work).await.unwrap();
            }
        });
        settled.buffer_unordered(50).collect::<Vec<_>>().await;
        assert_eq!(worked.load(Ordering::SeqCst), 50, "each once");
        let inner = queues.inner();
        assert!(inner.queues.is_empty() && inner.ended.is_empty(), "{inner:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_for_meanwhile_is_done_as_well() {
        let queues = Arc::new(Queues::default());
        let slow = || -> Work {
            Box::pin(async {
                tokio::time::sleep(Duration::from_secs(60)).await;
                Err(VolumeError::CutShort("of the first version".into()))
            })
        };
        let again = queues.work("a".into(), version("x", 1), slow()).await.unwrap();
        assert_eq!(again, Action::requeue(LOOK_AGAIN));
        // The object has changed while it is worked on: what comes of that is no answer.
        settle(&queues, "a", version("x", 2), || Box::pin(async { done() })).await.unwrap();
        // And what failed is an error for whoever asked for that version.
        let error = settle(&queues, "a", version("x", 1), slow).await.unwrap_err();
        assert!(error.to_string().contains("of the first version"), "{error}");
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_the_next_goes_on() {
        let queues = Arc::new(Queues::default());
        let error = queues.work("a".into(), version("x", 1), async { panic!("on purpose") }).await.unwrap_err();
        assert!(matches!(error, VolumeError::CutShort(_)), "{error}");
        assert!(queues.work("a".into(), version("y", 1), async { done() }).await.is_ok());
    }
}
