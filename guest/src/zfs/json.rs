//! What the tools answer.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use zpod_volume::PoolName;

use crate::machine::streams::SendPoint;
use crate::machine::{Child, Fault, Health, LastScrub, Leaf, PoolReport, PoolState, Properties, ScrubState};

#[derive(Deserialize)]
struct Pools<P> {
    #[serde(default = "BTreeMap::new")]
    pools: BTreeMap<String, P>,
}

#[derive(Deserialize)]
struct Datasets {
    #[serde(default)]
    datasets: BTreeMap<String, Listed>,
}

/// An entry of `zpool list` or `zfs get`.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    properties: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Value {
    value: String,
}

/// An entry of `zpool status`. Numbers are strings there.
#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    status: String,
    #[serde(default)]
    action: String,
    #[serde(default)]
    error_count: String,
    #[serde(default)]
    scan_stats: Scan,
    #[serde(default)]
    vdevs: BTreeMap<String, Vdev>,
}

#[derive(Deserialize, Default)]
struct Scan {
    #[serde(default)]
    function: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    scrub_pause: String,
    #[serde(default)]
    end_time: String,
    #[serde(default)]
    examined: String,
    #[serde(default)]
    errors: String,
}

impl Scan {
    /// The scan it tells of, if it is one of this kind: a scrub, or a resilver, which only mirrors have.
    fn of(&self, function: &str) -> Option<LastScrub> {
        // OpenZFS 2.3.2 prints 0 for "not paused" (seen in a guest, with -p), "-" without -p.
        let paused = !matches!(self.scrub_pause.as_str(), "" | "-" | "0");
        let state = match self.state.as_str() {
            "SCANNING" if paused => ScrubState::Paused,
            "SCANNING" => ScrubState::Running,
            "FINISHED" => ScrubState::Finished,
            "CANCELED" => ScrubState::Canceled,
            _ => return None,
        };
        let ended = if matches!(state, ScrubState::Running | ScrubState::Paused) { 0 } else { number(&self.end_time) };
        let scrub = LastScrub { state, ended, errors: number(&self.errors), bytes: number(&self.examined) };
        (self.function == function).then_some(scrub)
    }
}

#[derive(Deserialize)]
struct Vdev {
    #[serde(default)]
    vdev_type: String,
    #[serde(default)]
    guid: String,
    #[serde(default)]
    path: String,
    /// The path of a device that is not there.
    #[serde(default)]
    was: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    scan_processed: String,
    #[serde(default)]
    alloc_space: String,
    #[serde(default)]
    read_errors: String,
    #[serde(default)]
    write_errors: String,
    #[serde(default)]
    checksum_errors: String,
    #[serde(default)]
    vdevs: BTreeMap<String, Vdev>,
}

impl Vdev {
    fn leaf(&self) -> Leaf {
        Leaf {
            guid: number(&self.guid),
            path: PathBuf::from(if self.was.is_empty() { &self.path } else { &self.was }),
            health: Health::parse(&self.state),
            mended: number(&self.scan_processed) > 0,
        }
    }
}

fn parse<T: DeserializeOwned>(output: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(output)
        .map_err(|error| Fault::new(format!("the answer of the ZFS tools does not parse: {error}")))
}

fn pool_named<P: DeserializeOwned>(output: &[u8], pool: &PoolName) -> Result<P, Fault> {
    let mut pools: Pools<P> = parse(output)?;
    pools.pools.remove(pool.as_str()).ok_or_else(|| Fault::new(format!("pool {pool} is not imported")))
}

fn properties(listed: Listed) -> Properties {
    listed.properties.into_iter().map(|(key, value)| (key, value.value)).collect()
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

pub(super) fn pool(output: &[u8], pool: &PoolName) -> Result<PoolState, Fault> {
    let properties = properties(pool_named(output, pool)?);
    let get = |key: &str| properties.get(key).map_or(0, |value| number(value));
    Ok(PoolState { expandable: get("expandsize") > 0, properties })
}

pub(super) fn dataset(output: &[u8], dataset: &str) -> Result<Option<Properties>, Fault> {
    let mut datasets: Datasets = parse(output)?;
    Ok(datasets.datasets.remove(dataset).map(properties))
}

pub(super) fn snapshots(output: &[u8], dataset: &str) -> Result<Vec<String>, Fault> {
    let datasets: Datasets = parse(output)?;
    let name = |full: &String| full.strip_prefix(dataset)?.strip_prefix('@').map(str::to_owned);
    Ok(datasets.datasets.keys().filter_map(name).collect())
}

/// What is below a dataset.
pub(super) fn children(output: &[u8], dataset: &str) -> Result<Vec<Child>, Fault> {
    let datasets: Datasets = parse(output)?;
    let below = datasets.datasets.into_iter().filter(|(name, _)| name != dataset);
    let child = |(dataset, listed)| {
        let mountable = properties(listed).get("canmount").is_some_and(|canmount| canmount == "on");
        Child { dataset, mountable }
    };
    // By name, a dataset comes before what is in it.
    Ok(below.map(child).collect())
}

/// The snapshots of a dataset, oldest first. What the tool says of one is in its properties, its transaction group too.
pub(super) fn send_points(output: &[u8], dataset: &str) -> Result<Vec<SendPoint>, Fault> {
    let datasets: Datasets = parse(output)?;
    let point = |(full, listed): (String, Listed)| {
        let name = full.strip_prefix(dataset)?.strip_prefix('@')?.to_owned();
        let properties = properties(listed);
        let get = |key: &str| properties.get(key).map_or(0, |value| number(value));
        let cloned = properties.get("clones").is_some_and(|clones| !matches!(clones.as_str(), "" | "-"));
        let point = SendPoint {
            name,
            guid: get("guid"),
            created: get("creation"),
            referenced: get("referenced"),
            used: get("used"),
            pinned: cloned || get("userrefs") > 0,
        };
        Some((get("createtxg"), point))
    };
    let mut points: Vec<_> = datasets.datasets.into_iter().filter_map(point).collect();
    points.sort_by_key(|(txg, _)| *txg);
    Ok(points.into_iter().map(|(_, point)| point).collect())
}

pub(super) fn report(output: &[u8], pool: &PoolName) -> Result<PoolReport, Fault> {
    let status: Status = pool_named(output, pool)?;
    let mut report = PoolReport {
        message: [status.status.trim(), status.action.trim()].join(" ").trim().to_owned(),
        data_errors: number(&status.error_count),
        scrub: status.scan_stats.of("SCRUB"),
        resilver: status.scan_stats.of("RESILVER"),
        ..PoolReport::default()
    };
    // The one entry on top is the pool itself.
    report.allocated = status.vdevs.values().map(|root| number(&root.alloc_space)).sum();
    let mut left: Vec<_> = status.vdevs.values().collect();
    while let Some(vdev) = left.pop() {
        // Errors are counted where they happened: at the leaves.
        if vdev.vdevs.is_empty() {
            report.read_errors += number(&vdev.read_errors);
            report.write_errors += number(&vdev.write_errors);
            report.checksum_errors += number(&vdev.checksum_errors);
            if vdev.vdev_type == "disk" {
                report.leaves.push(vdev.leaf());
            }
        }
        left.extend(vdev.vdevs.values());
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    // What the tools of OpenZFS 2.3.2 printed in a guest, shortened.
    const STATUS: &str = r#"{"output_version":{"command":"zpool status","vers_major":0,"vers_minor":1},"pools":
        {"zpod-7b32fb880c15":{"name":"zpod-7b32fb880c15","state":"ONLINE","pool_guid":"13063684485680073786","txg":"4",
        "vdevs":{"zpod-7b32fb880c15":{"name":"zpod-7b32fb880c15","vdev_type":"root","state":"ONLINE",
        "alloc_space":"704512","total_space":"436207616","read_errors":"0","write_errors":"0","checksum_errors":"0",
        "vdevs":{"/zpod/disks/x":{"name":"/zpod/disks/x","vdev_type":"disk","state":"ONLINE","alloc_space":"704512",
        "read_errors":"0","write_errors":"2","checksum_errors":"3","slow_ios":"0"}}}},"error_count":"1"}}}"#;
    const LIST: &str = r#"{"output_version":{"command":"zpool list","vers_major":0,"vers_minor":1},"pools":
        {"zpod-7b32fb880c15":{"name":"zpod-7b32fb880c15","type":"POOL","state":"ONLINE","properties":
        {"expandsize":{"value":"-","source":{"type":"NONE","data":"-"}},
        "autotrim":{"value":"on","source":{"type":"LOCAL","data":"-"}}}}}}"#;
    const GET: &str = r#"{"output_version":{"command":"zfs get","vers_major":0,"vers_minor":1},"datasets":
        {"zpod-7b32fb880c15/data":{"name":"zpod-7b32fb880c15/data","type":"FILESYSTEM","properties":
        {"refquota":{"value":"268435456","source":{"type":"LOCAL","data":"-"}},
        "compressratio":{"value":"1.01","source":{"type":"NONE","data":"-"}}}}}}"#;

    const CHILDREN: &str = r#"{"output_version":{"command":"zfs list","vers_major":0,"vers_minor":1},"datasets":
        {"p/data":{"name":"p/data","properties":{"canmount":{"value":"on"}}},
        "p/data/b":{"name":"p/data/b","properties":{"canmount":{"value":"noauto"}}},
        "p/data/a/c":{"name":"p/data/a/c","properties":{"canmount":{"value":"on"}}},
        "p/data/a":{"name":"p/data/a","properties":{"canmount":{"value":"on"}}}}}"#;

    #[test]
    fn children_come_behind_what_they_are_in() {
        let found = children(CHILDREN.as_bytes(), "p/data").unwrap();
        let found: Vec<_> = found.iter().map(|child| (child.dataset.as_str(), child.mountable)).collect();
        assert_eq!(found, [("p/data/a", true), ("p/data/a/c", true), ("p/data/b", false)]);
    }

    fn name() -> PoolName {
        "zpod-7b32fb880c15".parse().unwrap()
    }

    #[test]
    fn what_the_tools_print_is_read() {
        let report = report(STATUS.as_bytes(), &name()).unwrap();
        assert_eq!((report.allocated, report.data_errors), (704_512, 1));
        assert_eq!((report.read_errors, report.write_errors, report.checksum_errors), (0, 2, 3));
        assert!(report.scrub.is_none() && report.message.is_empty());
        let state = pool(LIST.as_bytes(), &name()).unwrap();
        assert!(!state.expandable && state.properties["autotrim"] == "on");
        assert!(
            pool(LIST.replace("\"value\":\"-\"", "\"value\":\"16777216\"").as_bytes(), &name()).unwrap().expandable
        );
        let found = dataset(GET.as_bytes(), "zpod-7b32fb880c15/data").unwrap().unwrap();
        assert_eq!(found["refquota"], "268435456");
        assert_eq!(dataset(GET.as_bytes(), "zpod-7b32fb880c15/other").unwrap(), None);
    }

    #[test]
    fn snapshots_are_those_of_the_dataset_itself() {
        let list = r#"{"output_version":{"command":"zfs list","vers_major":0,"vers_minor":1},"datasets":
            {"p/data@b":{"name":"p/data@b","type":"SNAPSHOT","properties":{}},"p/data2@a":{"properties":{}},
            "p/data@a":{"properties":{}}}}"#;
        assert_eq!(snapshots(list.as_bytes(), "p/data").unwrap(), ["a", "b"]);
        assert_eq!(snapshots(br#"{"datasets":{}}"#, "p/data").unwrap(), [""; 0]);
    }

    #[test]
    fn send_points_come_in_the_order_in_which_they_were_taken() {
        let list = r#"{"datasets":{
            "p/data@zpod-send-a":{"name":"p/data@zpod-send-a","properties":{"guid":{"value":"17446744073709551615"},
            "creation":{"value":"1763900000"},"createtxg":{"value":"90"},"referenced":{"value":"5"},"used":{"value":"1"}}},
            "p/data@zpod-send-b":{"properties":{"createtxg":{"value":"12"}}},"p/data2@x":{"properties":{}}}}"#;
        let points = send_points(list.as_bytes(), "p/data").unwrap();
        assert_eq!(points.iter().map(|point| point.name.as_str()).collect::<Vec<_>>(), ["zpod-send-b", "zpod-send-a"]);
        assert_eq!((points[1].guid, points[1].created), (17_446_744_073_709_551_615, 1_763_900_000));
        assert_eq!((points[1].referenced, points[1].used), (5, 1));
    }

    #[test]
    fn a_pool_that_is_not_there_is_an_error_that_names_it() {
        let error = report(br#"{"pools":{}}"#, &name()).unwrap_err().to_string();
        assert!(error.contains("zpod-7b32fb880c15 is not imported"), "{error}");
    }

    #[test]
    fn a_scrub_is_told_from_its_beginning_to_its_end_and_a_resilver_is_none() {
        let scan = |function: &str, state: &str, pause: &str| {
            let scan = format!(
                r#""scan_stats":{{"function":"{function}","state":"{state}","start_time":"1763900000","end_time":
                "1763900060","to_examine":"900","examined":"704512","errors":"3","scrub_pause":"{pause}"}},"vdevs""#
            );
            report(STATUS.replacen(r#""vdevs""#, &scan, 1).as_bytes(), &name()).unwrap().scrub
        };
        for (state, pause, want, ended) in [
            ("SCANNING", "-", ScrubState::Running, 0),
            ("SCANNING", "0", ScrubState::Running, 0),
            ("SCANNING", "1763900010", ScrubState::Paused, 0),
            ("FINISHED", "-", ScrubState::Finished, 1_763_900_060),
            ("CANCELED", "-", ScrubState::Canceled, 1_763_900_060),
        ] {
            let want = LastScrub { state: want, ended, errors: 3, bytes: 704_512 };
            assert_eq!(scan("SCRUB", state, pause), Some(want), "{state} {pause}");
        }
        assert_eq!((scan("RESILVER", "FINISHED", "-"), scan("SCRUB", "NONE", "-")), (None, None));
        let resilver =
            STATUS.replacen(r#""vdevs""#, r#""scan_stats":{"function":"RESILVER","state":"SCANNING"},"vdevs""#, 1);
        assert!(report(resilver.as_bytes(), &name()).unwrap().resilvering());
    }

    proptest! {
        #[test]
        fn no_output_makes_the_parsers_panic(output in any::<Vec<u8>>()) {
            let _ = (report(&output, &name()), pool(&output, &name()), dataset(&output, "x"), snapshots(&output, "x"));
        }
    }
}
