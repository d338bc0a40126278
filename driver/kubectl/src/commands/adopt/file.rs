use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use kube::Resource as _;
use serde_json::{Value, json};
use zpod_kubernetes::Kept;
use zpod_kubernetes::crd::{GROUP, ZfsSnapshot, ZfsVolume};

use super::{kind_of, name_of, value_of};
use crate::Failure;

/// The records that are to be made: a List, as `kubectl create -f` takes it as well.
#[derive(Debug)]
pub(super) struct RecordFile {
    path: PathBuf,
    /// By kind and name, volumes after snapshots.
    records: BTreeMap<(String, String), Value>,
}

impl RecordFile {
    /// A new file. One that is there is never written over: it may be all that is left of something.
    pub(super) fn create(path: &Path) -> Result<Self, Failure> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let remedy = "nothing was changed; --file names another one, and --from makes what is in one that is there";
        file.map_err(|error| Failure::failed(format!("the file {}: {error}", path.display()), remedy))?;
        Ok(Self { path: path.to_owned(), records: BTreeMap::new() })
    }

    /// One that was written before.
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let wrong =
            |what: String| Failure::failed(format!("the file {}: {what}", path.display()), "nothing was changed");
        let text = fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let list: Value = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let items = list["items"].as_array().ok_or_else(|| wrong("it is no List of objects".into()))?;
        let mut file = Self { path: path.to_owned(), records: BTreeMap::new() };
        for item in items {
            let ours = item["apiVersion"] == ZfsVolume::api_version(&()).as_ref()
                && [ZfsVolume::kind(&()), ZfsSnapshot::kind(&())].contains(&kind_of(item).into());
            if !ours || name_of(item).is_empty() {
                return Err(wrong(format!(
                    "it has {} {}, which is no record of {GROUP}",
                    kind_of(item),
                    name_of(item)
                )));
            }
            match to_make(item).map_err(|what| wrong(format!("{} {}: {what}", kind_of(item), name_of(item))))? {
                Some(record) => file.put(record),
                None => continue,
            }
        }
        Ok(file)
    }

    /// Adds a record, or replaces it.
    pub(super) fn put(&mut self, record: Value) {
        self.records.insert((kind_of(&record), name_of(&record)), record);
    }

    /// Leaves a record out.
    pub(super) fn remove(&mut self, kind: &str, name: &str) {
        self.records.remove(&(kind.to_owned(), name.to_owned()));
    }

    /// Its records.
    pub(super) fn records(&self) -> impl Iterator<Item = &Value> {
        self.records.values()
    }

    /// Writes it out, whole and durable, before anything is changed that it is needed for.
    pub(super) fn write(&self) -> Result<(), Failure> {
        let wrong = |error: std::io::Error| {
            Failure::failed(
                format!("the file {} can't be written: {error}", self.path.display()),
                "--file names another one",
            )
        };
        let items: Vec<_> = self.records.values().collect();
        let text = serde_json::to_vec_pretty(&json!({"apiVersion": "v1", "kind": "List", "items": items}));
        let text = text.map_err(|error| wrong(error.into()))?;
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let new = PathBuf::from(name);
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new).map_err(wrong)?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(wrong)?;
        fs::rename(&new, &self.path).map_err(wrong)?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(wrong)
    }
}

/// The object to be made: of what this command has written, or of an object as the API server gave it (`kubectl get -o json`).
/// None for what was being destroyed, or never made.
fn to_make(item: &Value) -> Result<Option<Value>, String> {
    if kind_of(item) == ZfsVolume::kind(&()) { anew_of::<ZfsVolume>(item) } else { anew_of::<ZfsSnapshot>(item) }
}

fn anew_of<K: Kept>(item: &Value) -> Result<Option<Value>, String> {
    let object: K = serde_json::from_value(item.clone()).map_err(|error| error.to_string())?;
    if object.is_to_be_destroyed() {
        return Ok(None);
    }
    let anew = object.anew().map_err(|error| error.to_string())?;
    anew.map(|anew| value_of(&anew)).transpose().map_err(|error| error.to_string())
}
