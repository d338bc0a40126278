use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Registry;
use zpod_volume::{Bytes, VolumeId};

use super::gauges;
use crate::guest::{Health, ScrubState, Usage, VolumeReport};
use crate::volumes::{CLAIM_NAME, CLAIM_NAMESPACE, Observed, Observer};

const HEALTHS: [Health; 6] =
    [Health::Online, Health::Degraded, Health::Faulted, Health::Suspended, Health::Unavailable, Health::Unknown];

/// Something that holds the space of a volume: name, help, and how much.
type Held = (&'static str, &'static str, fn(&VolumeReport) -> Bytes);

const HELD: [Held; 3] = [
    ("zpod_volume_used_by_snapshots_bytes", "What ZFS snapshots in the pool alone hold", |report| report.snapshots),
    ("zpod_volume_used_by_children_bytes", "What datasets below the volume's hold", |report| report.children),
    ("zpod_volume_used_by_dataset_bytes", "What the volume's own contents hold", |report| report.dataset),
];

/// The volumes that are published here, as their guests last told.
#[derive(Debug)]
pub struct VolumeMetrics {
    node: String,
    samples: Mutex<BTreeMap<VolumeId, Sample>>,
}

#[derive(Debug)]
struct Sample {
    id: String,
    namespace: String,
    claim: String,
    capacity: u64,
    /// Nothing where a container runs without the volume, and no guest has told of it.
    report: Option<VolumeReport>,
    /// When the last scrub ended that saw everything.
    scrubbed: Option<u64>,
    /// Reports of sandboxes that showed the token of one that another one has.
    second_claims: u64,
}

impl Sample {
    /// What a guest has not imported has no usage: zero would be a lie.
    fn usage(&self) -> Option<Usage> {
        self.report.as_ref().map(|report| report.bytes).filter(|usage| usage.total > 0)
    }
}

type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

impl VolumeMetrics {
    /// Registers the volumes of a node. What it gives is to be told of reports.
    pub fn register(registry: &mut Registry, node: &str) -> Arc<Self> {
        let metrics = Arc::new(Self { node: node.to_owned(), samples: Mutex::default() });
        registry.register_collector(Box::new(metrics.clone()));
        metrics
    }

    fn samples(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Sample>> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, volume: &Observed, report: Option<&VolumeReport>) {
        let scrub = report.and_then(|report| report.scrub).filter(|scrub| scrub.state == ScrubState::Finished);
        let ended = scrub.and_then(|scrub| scrub.ended);
        let mut samples = self.samples();
        let before = samples.remove(&volume.id);
        let (scrubbed, second_claims) = before.map_or((None, 0), |sample| (sample.scrubbed, sample.second_claims));
        let sample = Sample {
            id: volume.id.to_string(),
            namespace: volume.label(CLAIM_NAMESPACE).to_owned(),
            claim: volume.label(CLAIM_NAME).to_owned(),
            capacity: volume.capacity.0,
            report: report.cloned(),
            scrubbed: ended.or(scrubbed),
            second_claims,
        };
        samples.insert(volume.id, sample);
    }

    fn labels<'a>(&'a self, sample: &'a Sample) -> Labels<'a, 4> {
        [
            ("namespace", &sample.namespace),
            ("persistentvolumeclaim", &sample.claim),
            ("volume", &sample.id),
            ("node", &self.node),
        ]
    }

    fn with<'a>(&'a self, sample: &'a Sample, key: &'static str, value: &'a str) -> Labels<'a, 5> {
        let [a, b, c, d] = self.labels(sample);
        [a, b, c, d, (key, value)]
    }
}

impl Observer for VolumeMetrics {
    fn reported(&self, volume: &Observed, report: &VolumeReport) {
        self.note(volume, Some(report));
    }

    fn unheard(&self, volume: &Observed, _reason: &str) {
        self.note(volume, None);
    }

    fn claimed_again(&self, volume: &Observed, _sandbox: &str) {
        // Whoever has it was heard first.
        if let Some(sample) = self.samples().get_mut(&volume.id) {
            sample.second_claims += 1;
        }
    }

    fn withdrawn(&self, id: VolumeId) {
        self.samples().remove(&id);
    }
}

impl Collector for VolumeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let samples = self.samples();
        let gauge = |encoder: &mut DescriptorEncoder<'_>, name, help, value: fn(&Sample) -> Option<f64>| {
            gauges(encoder, name, help, samples.values().filter_map(|s| Some((self.labels(s), value(s)?))))
        };
        gauge(&mut encoder, "zpod_volume_capacity_bytes", "What the volume holds", |s| Some(s.capacity as f64))?;
        gauge(&mut encoder, "zpod_volume_used_bytes", "Used, as df(1) shows it in the guest", |s| {
            s.usage().map(|usage| usage.used as f64)
        })?;
        gauge(&mut encoder, "zpod_volume_available_bytes", "Available, as df(1) shows it in the guest", |s| {
            s.usage().map(|usage| usage.available as f64)
        })?;
        for (name, help, held) in HELD {
            let values = samples.values().filter(|sample| sample.usage().is_some());
            let values = values.filter_map(|s| Some((self.labels(s), held(s.report.as_ref()?).0 as f64)));
            gauges(&mut encoder, name, help, values)?;
        }
        gauge(&mut encoder, "zpod_volume_compress_ratio", "Logical size over stored size", |s| {
            s.report.as_ref().filter(|report| report.health.is_imported()).map(|report| report.compress_ratio)
        })?;
        let help = "When the last scrub that saw everything ended, by the guest's clock";
        gauge(&mut encoder, "zpod_volume_last_scrub_timestamp_seconds", help, |s| s.scrubbed.map(|at| at as f64))?;
        let help =
            "1 while the volume has a schedule of snapshots and takes none, for want of room or since ZFS fails to";
        gauge(&mut encoder, "zpod_volume_snapshots_paused", help, |s| {
            let report = s.report.as_ref().filter(|report| report.health.is_imported())?;
            Some(f64::from(u8::from(report.paused.is_some())))
        })?;
        let healths = samples.values().flat_map(|sample| {
            let now = sample.report.as_ref().map_or(Health::Unknown, |report| report.health);
            HEALTHS.into_iter().map(move |health| {
                let labels = self.with(sample, "health", health.name());
                (labels, if health == now { 1.0 } else { 0.0 })
            })
        });
        let help = "1 for the health that the pool has, 0 for those it has not";
        gauges(&mut encoder, "zpod_volume_health", help, healths)?;
        if samples.is_empty() {
            return Ok(());
        }
        let help =
            "Failed reads and writes, wrong checksums, and files with permanent damage, since the pool was imported";
        let mut family = encoder.encode_descriptor("zpod_volume_errors", help, None, MetricType::Counter)?;
        for sample in samples.values() {
            let Some(report) = &sample.report else { continue };
            let errors = report.errors;
            for (kind, count) in [
                ("read", errors.read),
                ("write", errors.write),
                ("checksum", errors.checksum),
                ("data", report.data_errors),
            ] {
                ConstCounter::new(count).encode(family.encode_family(&self.with(sample, "type", kind))?)?;
            }
        }
        let help = "Reports of sandboxes that showed the token of a volume that another sandbox has: refused";
        let mut family = encoder.encode_descriptor("zpod_volume_second_claims", help, None, MetricType::Counter)?;
        for sample in samples.values() {
            ConstCounter::new(sample.second_claims).encode(family.encode_family(&self.labels(sample))?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Paused, Scrub};
    use prometheus_client::encoding::text::encode;
    use zpod_volume::Bytes;

    fn observed(name: &str) -> Observed {
        let labels = [(CLAIM_NAMESPACE, "prod"), (CLAIM_NAME, name)];
        Observed {
            id: VolumeId::from_name(name),
            target: "/x".into(),
            pod: None,
            labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            capacity: Bytes(1000),
        }
    }

    fn text(registry: &Registry) -> String {
        let mut text = String::new();
        encode(&mut text, registry).unwrap();
        text
    }

    #[test]
    fn a_published_volume_is_told_with_its_claim_until_it_is_withdrawn() {
        let mut registry = Registry::default();
        let metrics = VolumeMetrics::register(&mut registry, "n1");
        assert_eq!(text(&registry), "# EOF\n");
        let volume = observed("data");
        let mut report = VolumeReport::online(volume.id);
        (report.bytes.total, report.bytes.used, report.bytes.available) = (1000, 400, 600);
        (report.errors.checksum, report.compress_ratio) = (3, 1.5);
        (report.dataset, report.children, report.snapshots) = (Bytes(10), Bytes(20), Bytes(30));
        report.paused = Some(Paused::NoRoom);
        report.scrub = Some(Scrub { state: ScrubState::Finished, ended: Some(77), errors: 0, bytes: Bytes(1) });
        metrics.reported(&volume, &report);
        // One that runs again does not hide when everything was seen last.
        report.scrub = Some(Scrub { state: ScrubState::Running, ended: None, errors: 0, bytes: Bytes(1) });
        metrics.reported(&volume, &report);
        metrics.claimed_again(&volume, "other");
        metrics.claimed_again(&observed("unheard"), "other");
        metrics.reported(&volume, &report);
        let told = text(&registry);
        let labels = format!(
            r#"namespace="prod",persistentvolumeclaim="data",volume="{}",node="n1""#,
            VolumeId::from_name("data")
        );
        for line in [
            format!("zpod_volume_capacity_bytes{{{labels}}} 1000"),
            format!("zpod_volume_used_bytes{{{labels}}} 400"),
            format!("zpod_volume_available_bytes{{{labels}}} 600"),
            format!("zpod_volume_compress_ratio{{{labels}}} 1.5"),
            format!("zpod_volume_last_scrub_timestamp_seconds{{{labels}}} 77"),
            format!("zpod_volume_used_by_snapshots_bytes{{{labels}}} 30"),
            format!("zpod_volume_used_by_children_bytes{{{labels}}} 20"),
            format!("zpod_volume_used_by_dataset_bytes{{{labels}}} 10"),
            format!("zpod_volume_snapshots_paused{{{labels}}} 1"),
            format!(r#"zpod_volume_health{{{labels},health="Online"}} 1"#),
            format!(r#"zpod_volume_health{{{labels},health="Degraded"}} 0"#),
            format!(r#"zpod_volume_errors_total{{{labels},type="checksum"}} 3"#),
            format!("zpod_volume_second_claims_total{{{labels}}} 1"),
        ] {
            assert!(told.contains(&line), "{line} in {told}");
        }
        metrics.withdrawn(volume.id);
        assert_eq!(text(&registry), "# EOF\n");
    }

    #[test]
    fn a_volume_without_which_a_container_runs_is_unknown_until_a_guest_tells_of_it() {
        let mut registry = Registry::default();
        let metrics = VolumeMetrics::register(&mut registry, "n1");
        let volume = observed("data");
        metrics.unheard(&volume, "its disk was not plugged in");
        let told = text(&registry);
        assert!(told.contains(r#"health="Unknown"} 1"#) && told.contains(r#"health="Online"} 0"#), "{told}");
        assert!(!told.contains("used_bytes") && !told.contains("errors_total{"), "{told}");
        metrics.reported(&volume, &VolumeReport::online(volume.id));
        let told = text(&registry);
        assert!(told.contains(r#"health="Online"} 1"#) && told.contains(r#"node="n1"} 0"#), "{told}");
        metrics.unheard(&volume, "its disk was not plugged in");
        metrics.withdrawn(volume.id);
        assert_eq!(text(&registry), "# EOF\n");
    }

    #[test]
    fn a_volume_that_its_guest_refused_has_a_health_and_no_usage() {
        let mut registry = Registry::default();
        let metrics = VolumeMetrics::register(&mut registry, "n1");
        let volume = observed("data");
        metrics.reported(&volume, &VolumeReport { health: Health::Unavailable, ..VolumeReport::online(volume.id) });
        let told = text(&registry);
        assert!(told.contains(r#"health="Unavailable"} 1"#) && told.contains(r#"health="Online"} 0"#), "{told}");
        assert!(!told.contains("used_bytes") && !told.contains("ratio"), "{told}");
    }
}
