//! What the inline volumes of this node take, and how much of it one pod and one namespace may have.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use zpod_storage::catalog::{PodRef, Volume};
use zpod_volume::{Bytes, VolumeId};

use super::VolumeError;

/// How much of a node one pod and one namespace may have inline. No quota of Kubernetes counts these volumes.
#[derive(Debug, Clone, PartialEq)]
pub struct InlineLimits {
    /// The largest of them; 0: there are none.
    pub largest: Bytes,
    /// How many a pod may have.
    pub pod_count: u32,
    /// What those of a pod may hold together.
    pub pod_size: Share,
    /// How many the pods of a namespace may have on this node.
    pub namespace_count: u32,
    /// What those of a namespace may hold together on this node.
    pub namespace_size: Share,
}

impl InlineLimits {
    /// No inline volumes.
    pub const NONE: Self = Self::up_to(Bytes(0));

    /// With no other bound than that on each.
    pub const fn up_to(largest: Bytes) -> Self {
        let all = Share::Percent(100);
        Self { largest, pod_count: u32::MAX, pod_size: all, namespace_count: u32::MAX, namespace_size: all }
    }
}

/// A part of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// So much.
    Size(Bytes),
    /// So many percent of what volumes may take together on the node.
    Percent(u8),
}

impl Share {
    /// What it is of a total.
    pub fn of(self, total: Bytes) -> Bytes {
        match self {
            Self::Size(size) => size,
            Self::Percent(percent) => Bytes((u128::from(total.0) * u128::from(percent) / 100) as u64),
        }
    }
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(percent) = text.strip_suffix('%') else {
            return text.parse().map(Self::Size).map_err(|error| error.to_string());
        };
        match percent.parse() {
            Ok(percent @ 1..=100) => Ok(Self::Percent(percent)),
            _ => Err(format!("{text:?} is no share: 1% to 100%, or a size")),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size(size) => size.fmt(f),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// The inline volumes there are on this node, by kubelet's handle: a few for each pod. The node alone makes and ends them.
#[derive(Debug)]
pub(super) struct InlineVolumes {
    pub(super) limits: InlineLimits,
    taken: Mutex<HashMap<String, Taken>>,
}

#[derive(Debug)]
struct Taken {
    id: VolumeId,
    size: Bytes,
    /// Empty where the orchestrator did not say.
    namespace: String,
    pod: String,
}

impl Default for InlineVolumes {
    fn default() -> Self {
        Self { limits: InlineLimits::NONE, taken: Mutex::default() }
    }
}

impl InlineVolumes {
    fn taken(&self) -> MutexGuard<'_, HashMap<String, Taken>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes one that an earlier process has made, whatever its id was made of.
    pub(super) fn found(&self, volume: &Volume) {
        let pod = volume.publication.as_ref().and_then(|publication| publication.pod.as_ref());
        let taken = Taken::new(volume.id, volume.capacity, pod);
        self.taken().insert(volume.name.clone(), taken);
    }

    /// The id that the volume of a handle has here.
    pub(super) fn id(&self, handle: &str) -> Option<VolumeId> {
        self.taken().get(handle).map(|taken| taken.id)
    }

    /// Takes the room for a volume, if its pod and its namespace may have it. One that has it keeps it.
    pub(super) fn take(
        &self,
        node: &str,
        handle: &str,
        id: VolumeId,
        (size, pod): (Bytes, Option<&PodRef>),
        total: Bytes,
    ) -> Result<(), VolumeError> {
        let (mut all, new) = (self.taken(), Taken::new(id, size, pod));
        let others = |same: &dyn Fn(&Taken) -> bool| {
            let same = all.iter().filter(|(other, taken)| *other != handle && same(taken));
            same.fold((0_u32, 0_u64), |(count, bytes), (_, taken)| {
                (count.saturating_add(1), bytes.saturating_add(taken.size.0))
            })
        };
        let limits = &self.limits;
        let bounds = [
            (
                others(&|taken| taken.namespace == new.namespace && taken.pod == new.pod),
                (limits.pod_count, limits.pod_size),
                ("pod", "podCount", "podSize"),
                pod.map_or_else(|| "a pod without a name".to_owned(), |pod| format!("pod {pod}")),
            ),
            (
                others(&|taken| taken.namespace == new.namespace),
                (limits.namespace_count, limits.namespace_size),
                ("namespace", "namespaceCount", "namespaceSize"),
                format!("namespace {:?}", new.namespace),
            ),
        ];
        for ((count, bytes), (most, share), (kind, count_value, size_value), who) in bounds {
            let bound = share.of(total);
            if count < most && bytes.saturating_add(size.0) <= bound.0 {
                continue;
            }
            return Err(VolumeError::BoundReached {
                reason: format!(
                    "inline volumes: {who} has {count} on node {node}, of {} together, and {size} more is asked for; a {kind} \
                     may have {most}, of {bound} together (chart values node.ephemeralLimits.{count_value} and {size_value}): \
                     ask for less, end other pods, or use a PersistentVolumeClaim or a generic ephemeral volume \
                     (spec.volumes[].ephemeral), which quotas of the namespace count",
                    Bytes(bytes)
                ),
            });
        }
        all.insert(handle.to_owned(), new);
        Ok(())
    }

    /// Gives it back: there is no such volume any more.
    pub(super) fn give_back(&self, id: VolumeId) {
        self.taken().retain(|_, taken| taken.id != id);
    }
}

impl Taken {
    fn new(id: VolumeId, size: Bytes, pod: Option<&PodRef>) -> Self {
        let part = |part: fn(&PodRef) -> &str| pod.map(part).unwrap_or_default().to_owned();
        Self { id, size, namespace: part(|pod| &pod.namespace), pod: part(|pod| &pod.uid) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOTAL: Bytes = Bytes::gib(100);

    fn volumes() -> InlineVolumes {
        let limits = InlineLimits {
            largest: Bytes::gib(8),
            pod_count: 3,
            pod_size: Share::Size(Bytes::gib(10)),
            namespace_count: 5,
            namespace_size: Share::Percent(20),
        };
        InlineVolumes { limits, ..InlineVolumes::default() }
    }

    fn take(volumes: &InlineVolumes, namespace: &str, pod: &str, handle: &str, gib: u64) -> Result<(), String> {
        let (id, size) = (VolumeId::from_name(handle), Bytes::gib(gib));
        let pod = PodRef { namespace: namespace.into(), name: pod.into(), uid: pod.into() };
        volumes.take("n1", handle, id, (size, Some(&pod)), TOTAL).map_err(|error| error.to_string())
    }

    #[test]
    fn a_pod_and_a_namespace_have_their_part_and_others_get_theirs() {
        let volumes = volumes();
        for (handle, gib) in [("a", 1), ("b", 1), ("c", 8)] {
            take(&volumes, "evil", "p1", handle, gib).unwrap();
            take(&volumes, "evil", "p1", handle, gib).unwrap();
        }
        let error = take(&volumes, "evil", "p1", "d", 1).unwrap_err();
        assert!(error.contains("pod evil/p1 has 3 on node n1, of 10 GiB together"), "{error}");
        assert!(error.contains("node.ephemeralLimits.podCount") && error.contains("PersistentVolumeClaim"), "{error}");
        let error = take(&volumes, "evil", "p2", "d", 11).unwrap_err();
        assert!(error.contains("of 10 GiB together (chart values"), "{error}");
        take(&volumes, "evil", "p2", "d", 8).unwrap();
        let error = take(&volumes, "evil", "p3", "e", 3).unwrap_err();
        assert!(error.contains("namespace \"evil\" has 4") && error.contains("of 20 GiB together"), "{error}");
        take(&volumes, "evil", "p3", "e", 1).unwrap();
        let error = take(&volumes, "evil", "p4", "f", 1).unwrap_err();
        assert!(error.contains("may have 5"), "{error}");
        // The victim.
        take(&volumes, "prod", "db-0", "g", 8).unwrap();
        volumes.give_back(VolumeId::from_name("c"));
        take(&volumes, "evil", "p1", "h", 8).unwrap();
        assert_eq!(volumes.id("h"), Some(VolumeId::from_name("h")));
        assert_eq!(volumes.id("c"), None);
    }

    #[test]
    fn a_share_is_a_size_or_a_percentage() {
        assert_eq!("25%".parse::<Share>().unwrap().of(TOTAL), Bytes::gib(25));
        assert_eq!("2Gi".parse::<Share>().unwrap().of(TOTAL), Bytes::gib(2));
        for bad in ["0%", "101%", "%", "-1%", "much"] {
            assert!(bad.parse::<Share>().is_err(), "{bad}");
        }
    }
}
