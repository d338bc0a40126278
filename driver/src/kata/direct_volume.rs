use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zpod_storage::backing::Outcome;
use zpod_storage::crash;
use zpod_volume::{OPTION_PREFIX, VolumeSpec};

use super::{KataError, TargetPath};

const FILE: &str = "mountInfo.json";
/// Where entries are built and taken apart. A dot is not in the alphabet of base64url, so no target path has this name.
const ASIDE: &str = ".zpod";
/// No entry of ours is larger.
const MAX_FILE: u64 = 64 << 10;

/// Kata's direct volumes: for each target path a directory with a `mountInfo.json`, which makes the shim attach a
/// device instead of sharing the host's directory.
///
/// # Design
/// Kata's Go runtime shares the host directory where it finds an entry without valid JSON, so an entry appears and
/// vanishes whole, by rename. The options have neither `ro` nor `bind` nor `rbind`: the Go runtime would attach the
/// device read-only, or hand MS_BIND to the agent; the runtime in Rust would make the container's mount read-only.
#[derive(Debug, Clone)]
pub struct DirectVolumes {
    dir: PathBuf,
}

/// What the shim is told about a target path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirectVolume {
    /// Block device or regular file.
    pub device: PathBuf,
    /// For the guest.
    pub spec: VolumeSpec,
    /// Whether discards of the guest may give space back to the host.
    pub discard: bool,
}

/// The file, as both of Kata's runtimes read it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MountInfo {
    volume_type: String,
    device: PathBuf,
    fstype: String,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    #[serde(default)]
    options: Vec<String>,
}

impl DirectVolumes {
    /// Opens the directory, makes it where it is missing, and removes what an earlier process left half built.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn open(dir: &Path) -> Result<Self, KataError> {
        let aside = dir.join(ASIDE);
        make_dir(dir)?;
        match fs::remove_dir_all(&aside) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(KataError::io("remove", &aside)(error)),
            _ => make_dir(&aside)?,
        }
        Ok(Self { dir: dir.to_owned() })
    }

    /// Writes the entry of a target path, or replaces it.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn publish(&self, target: &TargetPath, volume: &DirectVolume) -> Result<Outcome, KataError> {
        let json = volume.to_json();
        let entry = self.entry(target);
        if read(&entry.join(FILE)).ok().flatten().is_some_and(|found| found == json) {
            return Ok(Outcome::Unchanged);
        }
        let aside = self.aside();
        make_dir(&aside)?;
        let placed = self.place(&aside, &entry, &json);
        if placed.is_err() {
            // Such as where there is no room: a call that is repeated leaves nothing each time. What can't be removed now
            // goes at the next start.
            let _ = fs::remove_dir_all(&aside);
        }
        placed.map(|()| Outcome::Changed)
    }

    /// Builds an entry aside and puts it into its place.
    fn place(&self, aside: &Path, entry: &Path, json: &[u8]) -> Result<(), KataError> {
        write(&aside.join(FILE), json)?;
        sync_dir(aside)?;
        crash::point("direct volume built aside");
        match fs::rename(aside, entry) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists) => {
                fs::rename(aside.join(FILE), entry.join(FILE)).map_err(KataError::io("replace", entry))?;
                fs::remove_dir(aside).map_err(KataError::io("remove", aside))?;
                sync_dir(entry)?;
            }
            Err(error) => return Err(KataError::io("rename into place", entry)(error)),
        }
        sync_dir(&self.dir)
    }

    /// Removes the entry of a target path.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn remove(&self, target: &TargetPath) -> Result<Outcome, KataError> {
        let (entry, aside) = (self.entry(target), self.aside());
        // Looked for first: a directory that can't be written to says so of what is not there, too.
        match fs::symlink_metadata(&entry) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Outcome::Unchanged),
            _ => {}
        }
        match fs::rename(&entry, &aside) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Outcome::Unchanged),
            Err(error) => return Err(KataError::io("move aside", &entry)(error)),
        }
        crash::point("direct volume moved aside");
        // Our file, and the empty files that Kata's Go runtime names after its sandboxes.
        fs::remove_dir_all(&aside).map_err(KataError::io("remove", &aside))?;
        sync_dir(&self.dir)?;
        Ok(Outcome::Changed)
    }

    /// The spec in the entry of a target path; `None` where there is no entry, or none of ours.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn spec(&self, target: &TargetPath) -> Result<Option<VolumeSpec>, KataError> {
        let Some(json) = read(&self.entry(target).join(FILE))? else { return Ok(None) };
        let info: Option<MountInfo> = serde_json::from_slice(&json).ok();
        let options = info.map(|info| info.options).unwrap_or_default();
        let value = options.iter().find_map(|option| option.strip_prefix(OPTION_PREFIX));
        Ok(value.and_then(|value| VolumeSpec::decode(value).ok()))
    }

    fn entry(&self, target: &TargetPath) -> PathBuf {
        self.dir.join(URL_SAFE.encode(target.as_path().as_os_str().as_encoded_bytes()))
    }

    fn aside(&self) -> PathBuf {
        self.dir.join(ASIDE).join(Uuid::new_v4().simple().to_string())
    }
}

impl DirectVolume {
    fn to_json(&self) -> Vec<u8> {
        let mut info = MountInfo {
            // The one word that both runtimes take.
            volume_type: "directvol".into(),
            device: self.device.clone(),
            fstype: "zfs".into(),
            metadata: BTreeMap::new(),
            options: vec![self.spec.to_option()],
        };
        if self.discard {
            // Kata's Go runtime lets discards through only with both of these. No file system is ever made by it: the
            // proxy in the guest takes the Storage out, and an agent without the proxy knows ext4 only and fails.
            info.metadata.insert("createFilesystem".into(), "true".into());
            info.options.push("discard".into());
        }
        // Strings and maps of strings always have a JSON form; a path that is not UTF-8 does not occur (TargetPath is
        // the key, the device path comes from our own configuration, checked at start).
        serde_json::to_vec(&info).unwrap_or_default()
    }
}

fn make_dir(path: &Path) -> Result<(), KataError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(KataError::io("create", path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), KataError> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.map_err(KataError::io("write", path))
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, KataError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(KataError::io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(KataError::io("read", path))?;
    Ok(Some(bytes))
}

fn sync_dir(path: &Path) -> Result<(), KataError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(KataError::io("sync", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use zpod_volume::{Bytes, Create, VolumeId};

    fn volume(create: Create) -> DirectVolume {
        let id = VolumeId::from_name("pvc-1");
        let new = VolumeSpec::new(id, Uuid::from_u128(1), create, Bytes::gib(1));
        let spec = VolumeSpec { read_only: true, ..new };
        DirectVolume { device: "/var/lib/zpod/x.raw".into(), spec, discard: true }
    }

    fn open() -> (tempfile::TempDir, DirectVolumes, TargetPath) {
        let dir = tempfile::tempdir().unwrap();
        let volumes = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
        let target = TargetPath::resolve(&dir.path().join("mount")).unwrap();
        (dir, volumes, target)
    }

    #[test]
    fn the_entry_is_what_both_runtimes_of_kata_read() {
        let (_dir, volumes, target) = open();
        assert_eq!(volumes.publish(&target, &volume(Create::Fresh)).unwrap(), Outcome::Changed);
        assert_eq!(volumes.publish(&target, &volume(Create::Fresh)).unwrap(), Outcome::Unchanged);
        let name = URL_SAFE.encode(target.as_path().to_str().unwrap());
        let entry = volumes.dir.join(name);
        let json: serde_json::Value = serde_json::from_slice(&fs::read(entry.join(FILE)).unwrap()).unwrap();
        assert_eq!(json["volume-type"], "directvol");
        assert_eq!(json["device"], "/var/lib/zpod/x.raw");
        assert_eq!(json["fstype"], "zfs");
        assert_eq!(json["metadata"]["createFilesystem"], "true");
        assert!(json["options"][0].as_str().unwrap().starts_with("zpod="));
        assert_eq!(json["options"].as_array().unwrap().len(), 2);
        assert_eq!(json["options"][1], "discard");
        assert_eq!(fs::metadata(&entry).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(entry.join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(volumes.spec(&target).unwrap(), Some(volume(Create::Fresh).spec));
    }

    #[test]
    fn an_entry_is_replaced_in_place_and_removed_with_the_sandbox_files_of_kata() {
        let (_dir, volumes, target) = open();
        volumes.publish(&target, &volume(Create::Fresh)).unwrap();
        fs::write(volumes.entry(&target).join("sandbox-1"), "").unwrap();
        volumes.publish(&target, &volume(Create::Never)).unwrap();
        assert_eq!(volumes.spec(&target).unwrap().unwrap().create, Create::Never);
        assert!(volumes.entry(&target).join("sandbox-1").exists());
        assert_eq!(volumes.remove(&target).unwrap(), Outcome::Changed);
        assert_eq!(volumes.remove(&target).unwrap(), Outcome::Unchanged);
        assert_eq!(volumes.spec(&target).unwrap(), None);
        assert_eq!(fs::read_dir(volumes.dir.join(ASIDE)).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_process_left_half_built_is_gone_at_the_next_start() {
        let (dir, volumes, _) = open();
        make_dir(&volumes.aside()).unwrap();
        let volumes = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
        assert_eq!(fs::read_dir(volumes.dir.join(ASIDE)).unwrap().count(), 0);
    }

    #[test]
    fn an_entry_that_can_not_be_written_leaves_nothing_however_often_it_is_tried() {
        let (dir, _, target) = open();
        let full = dir.path().join("full");
        fs::create_dir(&full).unwrap();
        // Its root, the directory aside and one entry's: no file can be made.
        rustix::mount::mount("full", &full, "tmpfs", rustix::mount::MountFlags::empty(), c"nr_inodes=3").unwrap();
        let volumes = DirectVolumes::open(&full).unwrap();
        for _ in 0..3 {
            let error = volumes.publish(&target, &volume(Create::Fresh)).unwrap_err();
            assert!(error.to_string().contains("No space left"), "{error}");
            assert_eq!(fs::read_dir(full.join(ASIDE)).unwrap().count(), 0);
        }
        rustix::mount::unmount(&full, rustix::mount::UnmountFlags::DETACH).unwrap();
    }

    #[test]
    fn the_longest_target_path_still_has_a_name() {
        assert!(URL_SAFE.encode([b'x'; super::super::MAX_TARGET_BYTES]).len() <= 255);
        assert!(URL_SAFE.encode([b'x'; super::super::MAX_TARGET_BYTES + 1]).len() > 255);
    }
}
