use std::collections::BTreeMap;
use std::time::Duration;

use kube::Resource as _;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use zpod_kubernetes::MODIFIED;
use zpod_kubernetes::crd::{ZfsVolume, ZfsVolumeSpec};
use zpod_volume::{PropertyKind, VolumeAttributes};

use crate::admin::{Admin, Line};
use crate::cluster::Cluster;
use crate::options::{Format, PropsGet, PropsSet};
use crate::output::show;
use crate::text::{or_dash, table};
use crate::{Failure, progress};

/// Owns what it sets in `spec.attributes`.
const MANAGER: &str = "kubectl-zpod-props";
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// A property.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Property {
    pub(super) key: String,
    pub(super) value: String,
    /// `class`, `attribute` (a VolumeAttributesClass or `props set`), `dataset` or `pool` (as the guest says).
    pub(super) source: &'static str,
    /// What the node has taken over, where that is not what is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) current: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Found {
    pub(super) volume: String,
    pub(super) properties: Vec<Property>,
}

pub(super) async fn get(cluster: &Cluster, options: &PropsGet, format: Format) -> Result<(), Failure> {
    let (named, keys) = options.meant()?;
    let volume = cluster.volume(&named).await?;
    let name = volume.metadata.name.clone().unwrap_or_default();
    let properties = match (options.live, name.parse()) {
        (true, Ok(id)) => {
            let admin = Admin::new(Line::to_node(cluster, &volume.spec.node_name).await?);
            as_they_are(admin.properties(id).await?)
        }
        _ => properties(&volume),
    };
    show_properties(name, properties, &keys, format)
}

/// Without a cluster: as the guest says.
pub(super) async fn of_socket(admin: &Admin, options: &PropsGet, format: Format) -> Result<(), Failure> {
    // Keys may follow the id, with a flag or without.
    let (named, keys) = options.meant()?;
    let id = named.on_one_machine()?;
    let properties = as_they_are(admin.properties(id).await?);
    show_properties(id.to_string(), properties, &keys, format)
}

fn as_they_are(said: zpod_admin::Properties) -> Vec<Property> {
    let of = |source| move |(key, value)| Property { key, value, source, current: None };
    said.dataset.into_iter().map(of("dataset")).chain(said.pool.into_iter().map(of("pool"))).collect()
}

/// Shows those that were asked for.
pub(super) fn show_properties(
    volume: String,
    mut properties: Vec<Property>,
    keys: &[String],
    format: Format,
) -> Result<(), Failure> {
    let unknown = keys.iter().find(|key| properties.iter().all(|property| property.key != **key));
    if let Some(key) = unknown {
        let known: Vec<_> = properties.iter().map(|property| property.key.as_str()).collect();
        let remedy = format!("what is: {}; docs/parameters.md has all of them and their defaults", known.join(", "));
        return Err(Failure::not_found(format!("{key} is not set"), remedy));
    }
    properties.retain(|property| keys.is_empty() || keys.contains(&property.key));
    let found = Found { volume, properties };
    show(format, &found, || {
        let row = |property: &Property| {
            let current = property.current.as_deref().unwrap_or(&property.value);
            vec![property.key.clone(), or_dash(&property.value), or_dash(current), property.source.into()]
        };
        table(&["PROPERTY", "VALUE", "TAKEN-OVER", "SOURCE"], found.properties.iter().map(row))
    })
}

/// What is asked for: the class, and the attributes on top of it.
fn properties(volume: &ZfsVolume) -> Vec<Property> {
    let (spec, status) = (&volume.spec, volume.status.clone().unwrap_or_default());
    let mut all = BTreeMap::new();
    for kind in [PropertyKind::Dataset, PropertyKind::Pool] {
        let class = spec.parameters.properties_of(kind);
        all.extend(class.into_iter().map(|(key, value)| (key, (value, "class"))));
    }
    all.extend(of_class(spec).map(|(key, value)| (key, (value, "class"))));
    let taken = |key: &str| status.attributes.get(key).cloned();
    let class: BTreeMap<String, String> = all.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect();
    all.extend(spec.attributes.iter().map(|(key, value)| (key.clone(), (value.clone(), "attribute"))));
    let property = |(key, (value, source)): (String, (String, &'static str))| {
        let current = taken(&key).or_else(|| class.get(&key).cloned()).unwrap_or_default();
        let behind = source == "attribute" && current != value;
        Property { key, value, source, current: behind.then_some(current) }
    };
    all.into_iter().map(property).collect()
}

/// What a class says of a volume beside properties of ZFS, where people ask for it.
fn of_class(spec: &ZfsVolumeSpec) -> impl Iterator<Item = (String, String)> {
    // What is left out there is the default.
    let said = serde_json::to_value(&spec.parameters).unwrap_or_default();
    [("quota", "refquota"), ("snapshotSchedule", "none"), ("zfsAccess", "none")].into_iter().map(
        move |(key, default)| {
            let value = said[key].as_str().unwrap_or(default);
            (key.to_owned(), value.to_owned())
        },
    )
}

pub(super) async fn set(cluster: &Cluster, options: &PropsSet, format: Format) -> Result<(), Failure> {
    let (named, changes) = options.meant()?;
    let pairs = changes.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    let changes = VolumeAttributes::parse(pairs)
        .map_err(|error| Failure::usage(error.to_string(), "docs/parameters.md says what each key means"))?;
    let volume = cluster.volume(&named).await?;
    let changes: BTreeMap<_, _> = changes.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
    let name = volume.metadata.name.clone().unwrap_or_default();
    let mut ours = applied_before(&volume);
    ours.extend(changes.clone());
    let object = json!({
        "apiVersion": ZfsVolume::api_version(&()), "kind": ZfsVolume::kind(&()), "metadata": {"name": name},
        "spec": {"attributes": ours},
    });
    let params = PatchParams::apply(MANAGER).force();
    let patched = cluster.volumes().patch(&name, &params, &Patch::Apply(object)).await;
    let patched = patched.map_err(|error| Failure::api("the properties can't be changed", &error))?;
    let volume = match options.no_wait {
        true => patched,
        false => {
            // Where nothing is asked for anew, the node has nothing to say.
            let generation = patched.metadata.generation.filter(|now| Some(*now) != volume.metadata.generation);
            wait(cluster, &name, &changes, generation, options.timeout).await?
        }
    };
    let keys: Vec<_> = changes.keys().cloned().collect();
    show_properties(name, properties(&volume), &keys, format)
}

/// What this program has set before: applied again, for what an applier leaves out it takes back.
fn applied_before(volume: &ZfsVolume) -> BTreeMap<String, String> {
    let managed = volume.metadata.managed_fields.iter().flatten();
    let ours = managed.filter(|entry| entry.manager.as_deref() == Some(MANAGER));
    let fields = ours.filter_map(|entry| entry.fields_v1.as_ref()).map(|fields| &fields.0);
    let attributes = fields.filter_map(|fields| fields.pointer("/f:spec/f:attributes").and_then(Value::as_object));
    let keys = attributes.flat_map(|map| map.keys()).filter_map(|key| key.strip_prefix("f:"));
    keys.filter_map(|key| Some((key.to_owned(), volume.spec.attributes.get(key)?.clone()))).collect()
}

/// Waits until the node has taken the changes over and the guest that runs has them, or the node says that it can't.
/// `generation` is that of the spec which asks for them.
async fn wait(
    cluster: &Cluster,
    name: &str,
    changes: &BTreeMap<String, String>,
    generation: Option<i64>,
    patience: Duration,
) -> Result<ZfsVolume, Failure> {
    let bar = progress::waiting("waiting for the node");
    let begun = Instant::now();
    loop {
        let volume = cluster.volumes().get(name).await.map_err(|error| Failure::api("the volume", &error))?;
        let status = volume.status.clone().unwrap_or_default();
        // The record has them before the guest does.
        let recorded = changes.iter().all(|(key, value)| status.attributes.get(key) == Some(value));
        let said = status.conditions.iter().find(|condition| condition.type_ == MODIFIED);
        let said = said.filter(|said| said.observed_generation >= generation);
        let done = said.map_or(generation.is_none(), |said| said.status == "True");
        let refused = said.filter(|said| said.status == "False");
        if recorded && done {
            bar.finish_and_clear();
            return Ok(volume);
        }
        if let Some(refused) = refused {
            bar.finish_and_clear();
            let what = format!("node {} can't change them: {}", volume.spec.node_name, refused.message);
            return Err(Failure::failed(what, "set them to what is possible; what is asked for now stays asked for"));
        }
        if begun.elapsed() >= patience {
            bar.finish_and_clear();
            let node = &volume.spec.node_name;
            let what = format!("node {node} has not taken them over in {} s", patience.as_secs());
            return Err(Failure::timed_out(
                what,
                format!("it will when it can; `kubectl zpod doctor {node}` looks at it"),
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;
    use crate::commands::fake::{Answers, path, volume};
    use crate::options::Target;

    fn options(changes: &[(&str, &str)]) -> PropsSet {
        PropsSet {
            target: Target { claim: None, id: Some(volume("", json!(null)).0.parse().unwrap()) },
            changes: changes.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect(),
            no_wait: false,
            timeout: Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn what_cannot_be_set_is_refused_before_the_cluster_is_asked() {
        let answers = Answers::default();
        for (change, why) in [(("ashift", "12"), "can't be changed"), (("compression", "best"), "lz4")] {
            let failure = set(&answers.cluster(), &options(&[change]), Format::Table).await.unwrap_err();
            assert_eq!(failure.kind, Kind::Usage);
            assert!(failure.to_string().contains(why), "{failure}");
        }
        assert!(answers.writes().is_empty());
    }

    #[tokio::test]
    async fn a_change_is_applied_with_what_was_set_before_and_waited_for() {
        let (id, mut object) = volume("db", json!({"phase": "Ready", "attributes": {"compression": "zstd"}}));
        object["spec"]["attributes"] = json!({"atime": "off", "sync": "always", "compression": "zstd"});
        object["metadata"]["managedFields"] = json!([
            {"manager": MANAGER, "operation": "Apply", "fieldsV1": {"f:spec": {"f:attributes": {"f:atime": {}}}}},
            {"manager": "zpod-controller", "operation": "Apply", "fieldsV1": {"f:spec": {"f:attributes": {"f:sync": {}}}}},
        ]);
        let answers = Answers::default().with(&path(&id), object);
        set(&answers.cluster(), &options(&[("compression", "zstd")]), Format::Json).await.unwrap();
        let writes = answers.writes();
        assert!(writes[0].query.contains("fieldManager=kubectl-zpod-props"), "{}", writes[0].query);
        assert_eq!(writes[0].body["spec"], json!({"attributes": {"atime": "off", "compression": "zstd"}}));
    }

    #[tokio::test]
    async fn a_node_that_refuses_is_quoted_and_one_that_is_silent_is_named() {
        let condition = json!({"type": "Modified", "status": "False", "reason": "Refused", "observedGeneration": 7,
                               "message": "recordsize is too large", "lastTransitionTime": "2026-01-01T00:00:00Z"});
        let (id, mut object) = volume("db", json!({"phase": "Ready", "conditions": [condition]}));
        object["metadata"]["generation"] = json!(7);
        let answers = Answers::default().with(&path(&id), object.clone());
        let failure = set(&answers.cluster(), &options(&[("atime", "off")]), Format::Table).await.unwrap_err();
        assert!(failure.to_string().contains("node n1 can't change them: recordsize is too large"), "{failure}");
        // A refusal of what was asked for before is none of this.
        let changes = [("atime".to_owned(), "off".to_owned())].into();
        let failure = wait(&answers.cluster(), &id, &changes, Some(8), Duration::ZERO).await.unwrap_err();
        assert_eq!(failure.kind, Kind::TimedOut, "{failure}");
        assert!(failure.to_string().contains("kubectl zpod doctor n1"), "{failure}");
    }

    #[tokio::test]
    async fn what_is_recorded_and_not_in_the_guest_yet_is_waited_for() {
        let changes = [("atime".to_owned(), "off".to_owned())].into();
        for (seen, status, done) in [(7, "True", false), (8, "Unknown", false), (8, "True", true), (9, "True", true)] {
            let condition = json!({"type": "Modified", "status": status, "reason": "TakenOver", "message": "",
                                   "observedGeneration": seen, "lastTransitionTime": "2026-01-01T00:00:00Z"});
            let status = json!({"phase": "Ready", "attributes": {"atime": "off"}, "conditions": [condition]});
            let (id, object) = volume("db", status);
            let answers = Answers::default().with(&path(&id), object);
            let result = wait(&answers.cluster(), &id, &changes, Some(8), Duration::ZERO).await;
            assert_eq!(result.is_ok(), done, "seen {seen}: {result:?}");
        }
    }

    #[test]
    fn attributes_lie_on_top_of_the_class_and_what_is_not_taken_over_yet_shows() {
        let (_, mut object) = volume("db", json!({"phase": "Ready", "attributes": {"atime": "on"}}));
        object["spec"]["parameters"]["properties"] = json!({"compression": "zstd"});
        object["spec"]["attributes"] = json!({"atime": "on", "compression": "lz4"});
        let properties = properties(&serde_json::from_value(object).unwrap());
        let of = |key: &str| properties.iter().find(|property| property.key == key).unwrap();
        assert_eq!((of("compression").value.as_str(), of("compression").source), ("lz4", "attribute"));
        assert_eq!(of("compression").current.as_deref(), Some("zstd"));
        assert_eq!(of("atime").current, None);
    }

    #[test]
    fn what_the_class_says_of_quota_schedule_and_access_is_there_and_a_change_of_it_shows() {
        let shown = |parameters: Value, attributes: Value| {
            let (_, mut object) = volume("db", json!({"phase": "Ready", "attributes": attributes.clone()}));
            for (key, value) in parameters.as_object().unwrap() {
                object["spec"]["parameters"][key] = value.clone();
            }
            object["spec"]["attributes"] = attributes;
            let properties = properties(&serde_json::from_value(object).unwrap());
            ["quota", "snapshotSchedule", "zfsAccess"].map(|key| {
                let found = properties.iter().find(|property| property.key == key).unwrap();
                format!("{} {}", found.value, found.source)
            })
        };
        assert_eq!(shown(json!({}), json!({})), ["refquota class", "none class", "none class"]);
        let class = json!({"quota": "none", "snapshotSchedule": "hourly=24 daily=7", "zfsAccess": "volume"});
        assert_eq!(shown(class.clone(), json!({})), ["none class", "hourly=24 daily=7 class", "volume class"]);
        let changed = json!({"quota": "quota", "snapshotSchedule": "none"});
        assert_eq!(shown(class, changed), ["quota attribute", "none attribute", "volume class"]);
    }
}
