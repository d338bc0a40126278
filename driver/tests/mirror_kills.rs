//! A volume of two devices, killed between any two steps of a life in which it loses first one and then the other half.
//! Dead or alive, a half that lacks something is recorded as such, and whoever starts next is told so. The images are
//! real; what makes one device of them is simulated, and killed in `e2e/tests/mirror.rs`.
//!
//! `cargo test -p zpod-driver --features crash-points --test mirror_kills`. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[cfg(feature = "crash-points")]
#[path = "support/kills.rs"]
mod kills;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use zpod_driver::kata::{DirectVolumes, Halves, KataError, Removal};
use zpod_driver::volumes::{
    CapacityRange, Context, CreateRequest, Mirrors, NodeVolumes, Provision as _, Provisioner, PublishRequest,
};
use zpod_storage::backing::Outcome;
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::mirrored::Mirrored;
use zpod_storage::catalog::dir::DirCatalog;
use zpod_storage::catalog::{Catalog as _, Volume};
use zpod_volume::{Bytes, DiskLayout, Half, Vdevs, VolumeId, VolumeParameters, VolumeSpec};

const NAME: &str = "a";
const SIDES: [&str; 2] = ["first", "second"];
const ENTRIES: &str = "direct-volumes";
const STEP: &str = "step";
/// What the guest has written: at first, and while it had one half only.
const OLD: &[u8] = b"the tenant's bytes";
const NEW: &[u8] = b"the tenant's newer";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Create,
    Publish,
    /// A guest makes the pool, which is recorded.
    Write,
    Unpublish,
    Lose(Half),
    /// The next pod is told which half lacks something.
    PublishBehind(Half),
    /// It writes to the other one.
    WriteTo(Half),
    /// Its guest has given the half what it lacked, which is recorded.
    Heal(Half),
    Expand,
    NodeExpand,
    Delete,
}

const LIFE: [Step; 17] = [
    Step::Create,
    Step::Publish,
    Step::Write,
    Step::Unpublish,
    Step::Lose(Half::Second),
    Step::PublishBehind(Half::Second),
    Step::WriteTo(Half::First),
    Step::Unpublish,
    Step::PublishBehind(Half::Second),
    Step::Heal(Half::Second),
    Step::Unpublish,
    Step::Lose(Half::First),
    Step::PublishBehind(Half::First),
    Step::Unpublish,
    Step::Expand,
    Step::NodeExpand,
    Step::Delete,
];

fn id() -> VolumeId {
    VolumeId::from_name(NAME)
}

/// A device of two halves that is a file.
#[derive(Debug)]
struct FakeHalves(PathBuf);

impl Halves for FakeHalves {
    fn path(&self, _: VolumeId) -> PathBuf {
        self.0.clone()
    }

    fn join(&self, _: VolumeId, images: [Option<&Path>; 2], _: Bytes, _: bool) -> Result<Outcome, KataError> {
        assert!(images.iter().all(|image| image.is_some()), "a half is not replaced");
        Ok(match File::create_new(&self.0) {
            Ok(_) => Outcome::Changed,
            Err(_) => Outcome::Unchanged,
        })
    }

    fn part(&self, _: VolumeId, _: [Option<&Path>; 2], _: Removal) -> Result<Outcome, KataError> {
        Ok(if fs::remove_file(&self.0).is_ok() { Outcome::Changed } else { Outcome::Unchanged })
    }
}

/// Everything of one life, in a directory.
struct World {
    dir: PathBuf,
    mirrored: Arc<Mirrored>,
    catalog: Arc<DirCatalog>,
    node: NodeVolumes,
    provisioner: Provisioner,
}

impl World {
    async fn open(dir: &Path) -> Self {
        let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.join("state")).unwrap();
        let catalog = Arc::new(catalog);
        let [first, second] = SIDES.map(|side| Arc::new(FileBacking::open(dir.join(side), 1.0).unwrap()));
        let mirrored = Arc::new(Mirrored::new(first.clone(), second));
        let halves = Arc::new(FakeHalves(dir.join("joined")));
        let mirrors = Mirrors { backing: mirrored.clone(), halves };
        let (node, boot, snapshots) = ("node-1".into(), "boot-1".into(), Arc::new(snapshots));
        let context = Context::with_mirrors(node, boot, catalog.clone(), snapshots, first, Ok(mirrors));
        let direct = DirectVolumes::open(&dir.join(ENTRIES)).unwrap();
        let node = NodeVolumes::load(context.clone(), direct).await.unwrap();
        Self { dir: dir.to_owned(), mirrored, catalog, node, provisioner: Provisioner::new(context) }
    }

    /// The record, changed as the reports of guests change it.
    async fn record(&self, change: impl FnOnce(Volume) -> Volume) {
        let record = self.catalog.get(id()).await.unwrap().unwrap();
        self.catalog.update(change(record)).await.unwrap();
    }

    fn write(&self, half: Half, bytes: &[u8]) {
        let image = OpenOptions::new().write(true).open(self.mirrored.image(id(), half).unwrap()).unwrap();
        image.write_all_at(bytes, DiskLayout::PARTITION_START).unwrap();
    }

    /// As whoever calls zpod repeats it after a kill.
    async fn run(&self, step: Step) {
        let target = self.dir.join("pod");
        let larger = CapacityRange { required: Some(Bytes::mib(600)), limit: None };
        match step {
            Step::Create => {
                let parameters = VolumeParameters { vdevs: Vdevs::Mirror2, ..VolumeParameters::default() };
                let range = CapacityRange { required: Some(Bytes::mib(300)), limit: None };
                let request = CreateRequest { name: NAME.into(), parameters, range, ..CreateRequest::default() };
                self.provisioner.create(request).await.unwrap();
            }
            Step::Publish | Step::PublishBehind(_) => {
                self.node.publish(PublishRequest::new(id(), &target)).await.unwrap();
                let behind = if let Step::PublishBehind(half) = step { Some(half) } else { None };
                assert_eq!(entry(&self.dir).unwrap().mirror.unwrap().behind, behind);
            }
            Step::Write => {
                for half in Half::BOTH {
                    self.write(half, OLD);
                }
                self.record(|record| Volume { initialized: true, ..record }).await;
            }
            Step::Unpublish => {
                self.node.unpublish(id(), target).await.unwrap();
            }
            Step::Lose(half) => fs::remove_file(image(&self.dir, half).unwrap()).unwrap(),
            Step::WriteTo(half) => self.write(half, NEW),
            Step::Heal(half) => {
                self.write(half, NEW);
                self.record(|record| Volume { behind: None, ..record }).await;
            }
            Step::Expand => {
                self.provisioner.expand(id(), larger).await.unwrap();
            }
            Step::NodeExpand => {
                self.node.expand(id(), larger).await.unwrap();
            }
            Step::Delete => {
                self.provisioner.delete(id()).await.unwrap();
            }
        }
    }
}

/// What the guest of the next pod is told.
fn entry(dir: &Path) -> Option<VolumeSpec> {
    let entries = fs::read_dir(dir.join(ENTRIES)).ok()?;
    let json = entries.flatten().find_map(|entry| fs::read(entry.path().join("mountInfo.json")).ok())?;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    Some(VolumeSpec::decode(json["options"][0].as_str().unwrap().strip_prefix("zpod=").unwrap()).unwrap())
}

fn image(dir: &Path, half: Half) -> Option<PathBuf> {
    let files = fs::read_dir(dir.join(SIDES[half.index()])).unwrap().flatten().map(|file| file.path());
    files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "img"))
}

fn step(dir: &Path) -> usize {
    fs::read_to_string(dir.join(STEP)).map_or(0, |text| text.parse().unwrap())
}

/// What is started again and again, to be killed: goes on with the life in a directory.
#[tokio::test]
#[ignore = "what the other test starts, to be killed"]
async fn life() {
    let dir = PathBuf::from(std::env::var("ZPOD_TEST_DIR").unwrap());
    let world = World::open(&dir).await;
    while let Some(next) = LIFE.get(step(&dir)) {
        world.run(*next).await;
        fs::write(dir.join("next"), (step(&dir) + 1).to_string()).unwrap();
        fs::rename(dir.join("next"), dir.join(STEP)).unwrap();
    }
}

/// Whether it was killed.
fn go_on(dir: &Path, crash_at: Option<u64>) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "life", "--ignored", "--nocapture"]).env("ZPOD_TEST_DIR", dir).env_remove("ZPOD_CRASH_AT");
    command.envs(crash_at.map(|at| ("ZPOD_CRASH_AT", at.to_string())));
    let output = command.stdin(Stdio::null()).output().unwrap();
    let killed = output.status.signal() == Some(9);
    let said = [output.stdout, output.stderr].concat();
    assert!(killed || output.status.success(), "{crash_at:?}: {}", String::from_utf8_lossy(&said));
    killed
}

/// What must hold at every moment at which it may be killed.
async fn check(dir: &Path, context: &str) {
    let step = step(dir);
    let since = |wanted: Step| LIFE.iter().position(|each| *each == wanted).is_some_and(|at| step > at);
    if !since(Step::Write) || LIFE.get(step).is_none_or(|next| *next == Step::Delete) {
        return;
    }
    // Killed in the step that writes it, it may be there or not, and nothing was promised.
    let newest = if since(Step::WriteTo(Half::First)) { NEW } else { OLD };
    let (catalog, _) = zpod_storage::catalog::dir::open(dir.join("state")).unwrap();
    let record = catalog.get(id()).await.unwrap().unwrap();
    let mut complete = 0;
    for half in Half::BOTH {
        let Some(image) = image(dir, half) else { continue };
        let mut found = vec![0; newest.len()];
        File::open(image).unwrap().read_exact_at(&mut found, DiskLayout::PARTITION_START).unwrap();
        if found == newest {
            complete += 1;
            continue;
        }
        assert_eq!(record.behind, Some(half), "{context}: {half} lacks something, and that is not recorded");
        if let Some(entry) = entry(dir) {
            assert_eq!(entry.mirror.unwrap().behind, Some(half), "{context}: the guest is not told of {half}");
        }
    }
    assert!(complete > 0, "{context}: the tenant's bytes are nowhere");
}

async fn live(at: u64, again: Option<u64>) -> bool {
    let temporary = tempfile::tempdir().unwrap();
    let dir = temporary.path();
    for name in SIDES {
        fs::create_dir(dir.join(name)).unwrap();
    }
    let mut killed = false;
    for crash_at in [Some(at), again].into_iter().flatten() {
        killed |= go_on(dir, Some(crash_at));
        check(dir, &format!("point {at}, again {again:?}, step {:?}", LIFE.get(step(dir)))).await;
    }
    assert!(!go_on(dir, None));
    assert_eq!(step(dir), LIFE.len());
    let left: Vec<_> = Half::BOTH.into_iter().filter_map(|half| image(dir, half)).collect();
    assert!(left.is_empty() && entry(dir).is_none() && !dir.join("joined").exists(), "{left:?}");
    let (catalog, _) = zpod_storage::catalog::dir::open(dir.join("state")).unwrap();
    assert!(catalog.get(id()).await.unwrap().is_none());
    killed
}

#[tokio::test]
async fn a_mirror_lives_its_life() {
    assert!(!live(u64::MAX, None).await);
}

#[cfg(feature = "crash-points")]
#[tokio::test]
async fn a_mirror_killed_between_any_two_steps_never_takes_a_half_that_lacks_something_for_whole() {
    assert!(kills::at_each_point(live).await > 100, "no crash point was reached");
}
