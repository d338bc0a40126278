//! Undoes a deletion of records that nobody asked the data's end with.
//!
//! # Design
//! Kubernetes takes no deletion back: an object that was deleted has to go before another one can have its name. Its
//! finalizer holds it until then, and its node keeps device and data. So the records are written into a file first, each
//! as the object that is to be made; then an object is let go, as it was read and not as it may have become, and made
//! anew. Killed at any point, the file has what is missing, and `--from` makes it. Nothing here speaks to a node: the
//! new object carries what the old one's node had recorded, and that node takes it over.

mod file;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Resource as _, ResourceExt as _};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::Instant;
use zpod_kubernetes::Kept;
use zpod_kubernetes::crd::{FINALIZER, GROUP, Manager, ZfsNode, ZfsSnapshot, ZfsVolume};

use crate::cluster::Cluster;
use crate::options::{Adopt, Format};
use crate::output::show;
use crate::{Failure, progress};
use file::RecordFile;

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often an object is read again that somebody has changed meanwhile.
const TRIES: usize = 16;

/// What became of the records.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Outcome {
    records: Vec<Made>,
}

/// What became of one.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Made {
    kind: String,
    id: String,
    node: String,
    state: State,
    /// Why it is no further.
    #[serde(skip_serializing_if = "String::is_empty")]
    message: String,
}

/// How far it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
enum State {
    /// Made anew, and its node has taken it over.
    Adopted,
    /// Made anew; its node has not spoken yet.
    Made,
    /// There was one already.
    Existed,
    /// It could not be made: it is in the file.
    Saved,
    /// It was deleted, and can't be adopted now.
    Left,
}

pub(super) async fn run(cluster: &Cluster, options: &Adopt, format: Format) -> Result<(), Failure> {
    let (outcome, file) = match &options.from {
        Some(path) => {
            let file = RecordFile::open(path)?;
            let wanted: Vec<_> = file.records().cloned().map(|anew| Deleted { object: None, anew }).collect();
            check(cluster, &wanted).await?;
            (make_all(cluster, wanted, file, options.timeout).await?, path.clone())
        }
        None => adopt(cluster, options).await?,
    };
    show(format, &outcome, || text(&outcome))?;
    let first = |state: State| outcome.records.iter().find(|made| made.state == state);
    if let Some(made) = first(State::Saved) {
        return Err(Failure::failed(
            format!("{} {} can't be made now: {}", made.kind, made.id, made.message),
            format!(
                "it is in the file. Where the definitions of zpod's records were deleted, apply them again \
                 (docs/install.md), then: kubectl zpod adopt --from {}",
                file.display()
            ),
        ));
    }
    if let Some(made) = first(State::Made) {
        return Err(Failure::timed_out(
            format!("node {} has not taken all of its records over yet", made.node),
            "it does so when zpod-node runs there; the condition Ready of the objects says what it misses",
        ));
    }
    match first(State::Left) {
        None => Ok(()),
        Some(made) => Err(Failure::failed(
            format!("{} {} was not adopted: {}", made.kind, made.id, made.message),
            "ask again when its node is done with it, or have it destroyed: spec.destroy=true",
        )),
    }
}

/// A record that is to be made, and the object in its place that was deleted by hand, as far as it is known.
struct Deleted {
    object: Option<DynamicObject>,
    anew: Value,
}

async fn adopt(cluster: &Cluster, options: &Adopt) -> Result<(Outcome, PathBuf), Failure> {
    let path = options.file.clone().unwrap_or_else(|| PathBuf::from(format!("zpod-adopt-{}.json", now())));
    let (mut all, mut left) = (Vec::new(), Vec::new());
    deleted::<ZfsVolume>(cluster, &options.ids, &mut all, &mut left).await?;
    deleted::<ZfsSnapshot>(cluster, &options.ids, &mut all, &mut left).await?;
    let known = |id: &String| all.iter().any(|one| name_of(&one.anew) == *id) || left.iter().any(|one| one.id == *id);
    if let Some(missing) = options.ids.iter().find(|id| !known(id)) {
        return Err(Failure::not_found(
            format!("{missing} is no record that was deleted by hand: nothing was changed"),
            "records that DeleteVolume or DeleteSnapshot deletes are not; without an id, all that were deleted by hand are \
             adopted",
        ));
    }
    let mut outcome = Outcome::default();
    if !all.is_empty() {
        check(cluster, &all).await?;
        let mut file = RecordFile::create(&path)?;
        all.iter().for_each(|one| file.put(one.anew.clone()));
        file.write()?;
        outcome = make_all(cluster, all, file, options.timeout).await?;
    }
    outcome.records.extend(left);
    Ok((outcome, path))
}

fn now() -> String {
    Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string()
}

/// That nothing is let go which would not come back as it was: definitions from before leave out what a record is made with,
/// and a node plugin from before does not look at it.
async fn check(cluster: &Cluster, all: &[Deleted]) -> Result<(), Failure> {
    let definitions: Api<CustomResourceDefinition> = Api::all(cluster.client.clone());
    for kind in all.iter().map(|one| kind_of(&one.anew)).collect::<BTreeSet<_>>() {
        let name = format!("{}.{GROUP}", plural(&kind));
        let found = definitions.get_opt(&name).await.map_err(|error| Failure::api(&name, &error))?;
        let schema = found.map(|found| serde_json::to_value(found).unwrap_or_default());
        let knows = |schema: &Value| {
            let versions = schema["spec"]["versions"].as_array().cloned().unwrap_or_default();
            let spec = "/schema/openAPIV3Schema/properties/spec/properties/adopt";
            versions.iter().any(|version| version.pointer(spec).is_some())
        };
        if schema.is_some_and(|schema| !knows(&schema)) {
            return Err(Failure::failed(
                format!("the definition {name} is of an earlier version, which knows no adoption: nothing was changed"),
                "upgrade zpod with its definitions first",
            ));
        }
    }
    let nodes: Api<ZfsNode> = Api::all(cluster.client.clone());
    for name in all.iter().map(|one| node_of(&one.anew)).collect::<BTreeSet<_>>() {
        let node = match nodes.get_opt(&name).await {
            Ok(node) => node,
            // Its definition is not there either.
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(error) => return Err(Failure::api("ZfsNodes", &error)),
        };
        let version =
            node.and_then(|node| node.status).map(|status| status.version).filter(|version| !version.is_empty());
        if let Some(version) = version.filter(|version| version != env!("CARGO_PKG_VERSION")) {
            return Err(Failure::failed(
                format!(
                    "zpod-node on {name} is of version {version}, and this is {}: nothing was changed",
                    env!("CARGO_PKG_VERSION")
                ),
                "use the kubectl-zpod of that version, or wait until the upgrade is done",
            ));
        }
    }
    Ok(())
}

/// All of a kind, or those that are named, that somebody has deleted, and their data not: those that can be made anew, and the
/// others.
async fn deleted<K: Kept>(
    cluster: &Cluster,
    ids: &[String],
    all: &mut Vec<Deleted>,
    left: &mut Vec<Made>,
) -> Result<(), Failure> {
    let objects: Vec<K> = cluster.all(&K::plural(&())).await?;
    for object in objects.iter().filter(|object| ids.is_empty() || ids.contains(&object.name_any())) {
        match of::<K>(object)? {
            Some(one) => all.push(one),
            None if is_by_hand(object) => left.push(Made {
                kind: K::kind(&()).into(),
                id: object.name_any(),
                node: object.node().to_owned(),
                state: State::Left,
                message: "it was never made, or its node is at work on it".into(),
            }),
            None => {}
        }
    }
    Ok(())
}

/// Whether somebody has deleted it without a word on its data, and its node holds it.
fn is_by_hand<K: Kept>(object: &K) -> bool {
    let held = object.finalizers().iter().any(|finalizer| finalizer == FINALIZER);
    object.meta().deletion_timestamp.is_some() && !object.is_to_be_destroyed() && held
}

/// The object, where it is one that was deleted by hand and can be made anew.
fn of<K: Kept>(object: &K) -> Result<Option<Deleted>, Failure> {
    let broken = |error: &dyn std::fmt::Display| {
        Failure::failed(format!("{} {} can't be adopted: {error}", K::kind(&()), object.name_any()), "")
    };
    if !is_by_hand(object) {
        return Ok(None);
    }
    let Some(anew) = object.anew().map_err(|error| broken(&error))? else { return Ok(None) };
    let anew = value_of(&anew).map_err(|error| broken(&error))?;
    let object = serde_json::to_value(object).and_then(serde_json::from_value).map_err(|error| broken(&error))?;
    Ok(Some(Deleted { object: Some(object), anew }))
}

/// An object as it is to be made. What its node has recorded is in the spec.
fn value_of<K: Kept>(anew: &K) -> Result<Value, serde_json::Error> {
    let mut value = serde_json::to_value(anew)?;
    value.as_object_mut().map(|object| object.remove("status"));
    Ok(value)
}

/// Takes the finalizer off, and waits until the object is gone. What is in the file is the object as it was then: one that
/// has changed since it was read is read and written again first. Gives the record to make; none where its end was asked
/// for meanwhile.
async fn let_go(
    cluster: &Cluster,
    mut object: DynamicObject,
    mut anew: Value,
    file: &mut RecordFile,
    patience: Duration,
) -> Result<Option<Value>, Failure> {
    let (kind, name) = (kind_of(&anew), object.name_any());
    let failed = |error: &kube::Error| Failure::api("it can't be let go", error);
    let api = api(cluster, &kind);
    for _ in 0..TRIES {
        let left: Vec<_> = object.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).collect();
        let body = json!({"metadata": {"finalizers": left, "resourceVersion": object.resource_version()}});
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(body)).await {
            Ok(_) => return gone(&api, &object, patience).await.map(|()| Some(anew)),
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(failed(&error)),
        }
        let found = api.get_opt(&name).await.map_err(|error| failed(&error))?;
        // Somebody else has let it go, perhaps before he could make it anew.
        let Some(now) = found.filter(|now| now.uid() == object.uid()) else { return Ok(Some(anew)) };
        if now.data["spec"]["destroy"] == true {
            file.remove(&kind, &name);
            file.write()?;
            return Ok(None);
        }
        if let Some(again) = parse_any(&kind, now.clone())? {
            anew = again.anew;
            file.put(anew.clone());
            file.write()?;
        }
        object = now;
    }
    Err(Failure::failed("it is changed all the time", "try again"))
}

fn parse_any(kind: &str, object: DynamicObject) -> Result<Option<Deleted>, Failure> {
    if kind == ZfsVolume::kind(&()) { parse::<ZfsVolume>(object) } else { parse::<ZfsSnapshot>(object) }
}

fn parse<K: Kept>(object: DynamicObject) -> Result<Option<Deleted>, Failure> {
    let name = object.name_any();
    let object: K = object
        .try_parse()
        .map_err(|error| Failure::failed(format!("{} {name} can't be read: {error}", K::kind(&())), ""))?;
    of(&object)
}

async fn gone(api: &Api<DynamicObject>, object: &DynamicObject, patience: Duration) -> Result<(), Failure> {
    let (name, begun) = (object.name_any(), Instant::now());
    loop {
        let found = match api.get_metadata_opt(&name).await {
            Ok(found) => found,
            // Its definition was the last thing that waited for it.
            Err(kube::Error::Api(status)) if status.code == 404 => None,
            Err(error) => return Err(Failure::api(&name, &error)),
        };
        let Some(left) = found.filter(|found| found.metadata.uid == object.uid()) else { return Ok(()) };
        if begun.elapsed() >= patience {
            let left = left.metadata.finalizers.unwrap_or_default().join(", ");
            return Err(Failure::timed_out(
                format!("{name} is not gone: other finalizers hold it ({left})"),
                "let them go, then: kubectl zpod adopt --from the file that was written",
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Makes the records, one after the other, so that each is missing for a moment only, and waits until the nodes have taken them
/// over. What fails keeps the others from nothing.
async fn make_all(
    cluster: &Cluster,
    all: Vec<Deleted>,
    mut file: RecordFile,
    patience: Duration,
) -> Result<Outcome, Failure> {
    let bar = progress::waiting("making records anew");
    let mut outcome = Outcome::default();
    for Deleted { object, anew } in all {
        let (kind, id, node) = (kind_of(&anew), name_of(&anew), node_of(&anew));
        bar.set_message(format!("making {id} anew"));
        let (state, message) = match make(cluster, object, anew, &mut file, patience).await {
            Ok(made) => made,
            Err(failure) => (State::Saved, failure.to_string()),
        };
        outcome.records.push(Made { kind, id, node, state, message });
    }
    let begun = Instant::now();
    for made in outcome.records.iter_mut().filter(|made| made.state == State::Made) {
        bar.set_message(format!("waiting for node {}", made.node));
        let api = api(cluster, &made.kind);
        loop {
            let object = api.get(&made.id).await.map_err(|error| Failure::api(&made.id, &error))?;
            if is_ready(&object) {
                made.state = State::Adopted;
            }
            if made.state == State::Adopted || begun.elapsed() >= patience {
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
    bar.finish_and_clear();
    Ok(outcome)
}

/// Makes a record, once the object in its place that was deleted by hand is let go.
async fn make(
    cluster: &Cluster,
    object: Option<DynamicObject>,
    mut anew: Value,
    file: &mut RecordFile,
    patience: Duration,
) -> Result<(State, String), Failure> {
    let (kind, id) = (kind_of(&anew), name_of(&anew));
    let destroyed = || (State::Existed, "its data is being destroyed, as was asked for".to_owned());
    if let Some(object) = object {
        match let_go(cluster, object, anew, file, patience).await? {
            Some(last) => anew = last,
            None => return Ok(destroyed()),
        }
    }
    let refused = |error: &kube::Error| Failure::api("it can't be made", error);
    match create(cluster, &anew).await {
        Ok(()) => return Ok((State::Made, String::new())),
        Err(kube::Error::Api(status)) if status.code == 409 => {}
        Err(error) => return Err(refused(&error)),
    }
    let Some(found) = api(cluster, &kind).get_opt(&id).await.map_err(|error| refused(&error))? else {
        return Err(Failure::failed("it came and went", "try again"));
    };
    if found.metadata.deletion_timestamp.is_none() {
        return Ok((State::Existed, String::new()));
    }
    if found.data["spec"]["destroy"] == true {
        return Ok(destroyed());
    }
    // The call that was to let it go was cut short, or a backup is restored over it. What the object knows is later.
    if let Some(known) = parse_any(&kind, found.clone())?.filter(|known| !known.anew["spec"]["adopt"].is_null()) {
        anew = known.anew;
    }
    let Some(last) = let_go(cluster, found, anew, file, patience).await? else { return Ok(destroyed()) };
    create(cluster, &last).await.map_err(|error| refused(&error))?;
    Ok((State::Made, String::new()))
}

/// As zpod-controller makes it, so that it can change what it has asked for.
async fn create(cluster: &Cluster, record: &Value) -> Result<(), kube::Error> {
    let object: DynamicObject = serde_json::from_value(record.clone()).map_err(kube::Error::SerdeError)?;
    let params = PostParams { field_manager: Some(Manager::Controller.name().into()), ..PostParams::default() };
    api(cluster, &kind_of(record)).create(&params, &object).await.map(drop)
}

fn is_ready(object: &DynamicObject) -> bool {
    let conditions = object.data["status"]["conditions"].as_array().cloned().unwrap_or_default();
    conditions.iter().any(|condition| condition["type"] == "Ready" && condition["status"] == "True")
}

fn api(cluster: &Cluster, kind: &str) -> Api<DynamicObject> {
    let version = ZfsVolume::version(&());
    let gvk = GroupVersionKind::gvk(&ZfsVolume::group(&()), &version, kind);
    Api::all_with(cluster.client.clone(), &ApiResource::from_gvk_with_plural(&gvk, &plural(kind)))
}

fn plural(kind: &str) -> String {
    if kind == ZfsVolume::kind(&()) { ZfsVolume::plural(&()).into() } else { ZfsSnapshot::plural(&()).into() }
}

fn node_of(record: &Value) -> String {
    record["spec"]["nodeName"].as_str().unwrap_or_default().to_owned()
}

fn kind_of(record: &Value) -> String {
    record["kind"].as_str().unwrap_or_default().to_owned()
}

fn name_of(record: &Value) -> String {
    record["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

fn text(outcome: &Outcome) -> String {
    if outcome.records.is_empty() {
        return "no record was deleted by hand: there is nothing to adopt\n".into();
    }
    let words: BTreeMap<_, _> = outcome.records.iter().map(|made| ((&made.kind, &made.id), made)).collect();
    let line = |made: &&Made| {
        let state = match made.state {
            State::Adopted => "adopted",
            State::Made => "made, not taken over yet",
            State::Existed => "exists",
            State::Saved => "saved in the file, and not made",
            State::Left => "left as it is",
        };
        let why = if made.message.is_empty() { String::new() } else { format!(": {}", made.message) };
        format!("{} {}: {state} (node {}){why}\n", made.kind, made.id, made.node)
    };
    words.values().map(line).collect()
}

#[cfg(test)]
mod tests;
