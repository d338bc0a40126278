use std::any::Any;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use tempfile::TempDir;
use zpod_volume::{Provisioning, gpt};

use super::super::conformance::copies::{FULL, snapshot_id};
use super::super::conformance::{MIB, Rig, conformance, id, spec, thin};
use super::super::{Backing, CopySource, Outcome};
use super::*;

struct Files {
    backing: FileBacking,
    dir: TempDir,
}

impl Files {
    fn new() -> Self {
        Self::with_ratio(1.0)
    }

    fn with_ratio(ratio: f64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { backing: FileBacking::open(dir.path(), ratio).unwrap(), dir }
    }

    fn path(&self, id: VolumeId) -> PathBuf {
        self.dir.path().join(name_of(id))
    }

    fn restart(self) -> Self {
        drop(self.backing);
        Self { backing: FileBacking::open(self.dir.path(), 1.0).unwrap(), dir: self.dir }
    }

    fn promised(&self) -> u64 {
        self.backing.ledger().promises().iter().map(|promised| promised.reserved).sum()
    }

    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        self.backing
            .directory
            .each_name(|name| {
                names.extend((!matches!(name, "." | "..")).then(|| name.to_owned()));
                Ok(())
            })
            .unwrap();
        names
    }
}

impl Rig for Files {
    fn backing(&self) -> &dyn Backing {
        &self.backing
    }

    fn guest_writes(&self, id: VolumeId, at: u64) {
        let file = File::options().write(true).open(self.path(id)).unwrap();
        file.write_all_at(&[1; 4096], at).unwrap();
        file.sync_all().unwrap();
    }

    fn guest_rewrites(&self, id: VolumeId, at: u64) {
        static COUNT: AtomicU64 = AtomicU64::new(2);
        let file = File::options().write(true).open(self.path(id)).unwrap();
        let count = COUNT.fetch_add(1, Ordering::SeqCst);
        file.write_all_at(&count.to_le_bytes().repeat(512), at).unwrap();
        file.sync_all().unwrap();
    }

    fn contents(&self, id: VolumeId, at: u64) -> u64 {
        let mut bytes = [0; 8];
        File::open(self.path(id)).unwrap().read_exact_at(&mut bytes, at).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn note(&self, id: VolumeId) -> Vec<u8> {
        let mut bytes = vec![0; DiskLayout::SPEC_BYTES];
        File::open(self.path(id)).unwrap().read_exact_at(&mut bytes, DiskLayout::SPEC_OFFSET).unwrap();
        bytes
    }

    fn opened_elsewhere(&self, id: VolumeId) -> Box<dyn Any> {
        Box::new(File::open(self.path(id)).unwrap())
    }

    fn table(&self, id: VolumeId) -> Bytes {
        // A test may read; FileBacking never does.
        let mut bytes = [0; gpt::PRIMARY_BYTES];
        File::open(self.path(id)).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        let header = gpt::decode(&bytes).unwrap();
        assert_eq!(header.disk_guid, id.uuid());
        Bytes(header.partition_bytes)
    }
}

conformance!(Files::new());

#[test]
fn promises_are_exact_after_a_restart() {
    let files = Files::new();
    files.backing.create(&thin("a", 16)).unwrap();
    files.backing.create(&thin("b", 100)).unwrap();
    files.backing.create(&spec("c", 5, 66, Provisioning::Thick)).unwrap();
    files.backing.grow(&thin("a", 64)).unwrap();
    files.backing.destroy(id("b")).unwrap();
    assert_eq!(files.promised(), (64 + 1 + 5 + 1) * MIB);
    let files = files.restart();
    assert_eq!(files.promised(), (64 + 1 + 5 + 1) * MIB);
    assert_eq!(files.backing.create(&thin("a", 64)).unwrap(), Outcome::Unchanged);
}

#[test]
fn what_is_free_can_be_promised_more_than_once_only_where_that_was_asked_for() {
    let files = Files::with_ratio(3.0);
    let capacity = files.backing.capacity().unwrap();
    files.backing.create(&thin("a", capacity.largest.0 / MIB / 2)).unwrap();
    assert!(capacity.total.0 > files.backing.free().unwrap() * 2);
    for ratio in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let error = FileBacking::open(files.dir.path(), ratio).unwrap_err().to_string();
        assert!(error.contains("over-commit ratio"), "{error}");
    }
}

#[test]
fn promises_stay_within_the_space_when_many_ask_at_once() {
    let files = Files::new();
    let largest = files.backing.capacity().unwrap().largest.0 / MIB;
    // Any three fit, four don't.
    let each = largest * 2 / 7;
    let made = std::thread::scope(|scope| {
        let backing = &files.backing;
        let threads: Vec<_> =
            (0..8).map(|n| scope.spawn(move || backing.create(&thin(&n.to_string(), each)))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap().is_ok()).filter(|made| *made).count()
    });
    assert_eq!(made, 3);
    assert_eq!(files.promised(), 3 * (each + 1) * MIB);
    assert_eq!(files.names().len(), 3, "{:?}", files.names());
}

#[test]
fn one_process_has_the_directory() {
    let files = Files::new();
    let error = FileBacking::open(files.dir.path(), 1.0).unwrap_err().to_string();
    assert!(error.contains("another zpod process"), "{error}");
}

#[test]
fn a_directory_that_is_not_there_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("not-mounted");
    assert!(FileBacking::open(&missing, 1.0).is_err());
    assert!(!missing.exists());
}

#[test]
fn leftovers_of_creations_go_at_the_start_and_nothing_else_does() {
    let files = Files::new();
    files.backing.create(&thin("a", 16)).unwrap();
    let ours = files.dir.path().join(directory::temporary_name(id("b")));
    let strangers = [".x.tmp", "notes.txt", "b.img", ".zpod"].map(|name| files.dir.path().join(name));
    std::fs::write(&ours, "").unwrap();
    strangers.iter().for_each(|path| std::fs::write(path, "x").unwrap());
    let files = files.restart();
    assert!(!ours.exists());
    assert!(strangers.iter().all(|path| path.exists()));
    files.backing.device(id("a")).unwrap();
}

#[test]
fn an_image_whose_promise_is_lost_or_damaged_is_refused_with_a_remedy_and_counts_in_full() {
    let mut files = Files::new();
    let attribute = files.backing.abilities().unwrap().names.partition;
    for value in [None, Some("x"), Some(""), Some("016777216"), Some("-1"), Some("99999999999999999999999"), Some("0")]
    {
        let spec = thin(&format!("{value:?}"), 16);
        files.backing.create(&spec).unwrap();
        let file = File::open(files.path(spec.id)).unwrap();
        match value {
            None => rustix::fs::fremovexattr(&file, attribute).unwrap(),
            Some(value) => {
                rustix::fs::fsetxattr(&file, attribute, value.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
            }
        }
        drop(file);
        files = files.restart();
        assert_eq!(files.promised(), spec.layout.disk.0 + MIB, "{value:?}");
        let proof = files.backing.exclusive(spec.id).unwrap();
        for result in [
            files.backing.create(&spec).map(drop),
            files.backing.grow(&thin(&format!("{value:?}"), 32)).map(drop),
            files.backing.write_table(&spec, proof.as_ref()),
        ] {
            let error = result.unwrap_err();
            let remedy = format!("{error} {:?}", std::error::Error::source(&error));
            assert!(remedy.contains("setfattr"), "{value:?}: {remedy}");
        }
        // Mended, without a restart.
        let held = files.backing.held(spec.id).unwrap();
        image::set_promise(&held.file, attribute, spec.layout.partition).unwrap();
        assert_eq!(files.backing.create(&spec).unwrap(), Outcome::Unchanged);
        assert_eq!(files.promised(), spec.layout.partition.0 + MIB);
        drop((held, proof));
        files.backing.destroy(spec.id).unwrap();
    }
}

#[test]
fn destroy_takes_nothing_that_another_process_has_open() {
    let files = Files::new();
    let spec = thin("a", 16);
    files.backing.create(&spec).unwrap();
    let image = File::open(files.path(spec.id)).unwrap();
    let mut child = Command::new("/bin/sleep").arg("60").stdin(image).spawn().unwrap();
    // The parent's descriptor went into the child; only the child has it now.
    let error = files.backing.destroy(spec.id).unwrap_err();
    assert!(matches!(error, BackingError::InUse { .. }), "{error}");
    assert!(files.path(spec.id).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    files.backing.destroy(spec.id).unwrap();
}

#[test]
fn a_process_that_opens_a_device_while_its_table_is_written_waits_and_kills_nobody() {
    let files = Files::new();
    let spec = thin("a", 16);
    files.backing.create(&spec).unwrap();
    let proof = files.backing.exclusive(spec.id).unwrap();
    let mut child = Command::new("/bin/cat")
        .arg(files.path(spec.id))
        .stdout(std::process::Stdio::null())
        .process_group(0)
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the other process must wait");
    // Somebody waits: no more writing.
    assert!(matches!(files.backing.write_table(&spec, proof.as_ref()), Err(BackingError::InUse { .. })));
    assert!(matches!(files.backing.exclusive(spec.id), Err(BackingError::InUse { .. })));
    drop(proof);
    assert!(child.wait().unwrap().success());
}

#[test]
fn who_wants_the_same_proof_at_the_same_time_gets_it() {
    let files = Files::new();
    let spec = thin("a", 16);
    files.backing.create(&spec).unwrap();
    for _ in 0..200 {
        let together = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            let prove = || {
                together.wait();
                files.backing.exclusive(spec.id).map(drop)
            };
            let other = scope.spawn(prove);
            prove().unwrap();
            other.join().unwrap().unwrap();
        });
    }
}

#[test]
fn a_lock_of_qemu_is_named() {
    let files = Files::new();
    let spec = thin("a", 16);
    files.backing.create(&spec).unwrap();
    let other = File::options().read(true).write(true).open(files.path(spec.id)).unwrap();
    assert!(fcntl::lock_all(std::os::fd::AsFd::as_fd(&other)).unwrap());
    let error = files.backing.exclusive(spec.id).unwrap_err().to_string();
    assert!(error.contains("a lock is held at byte 0") && error.contains("fuser"), "{error}");
}

#[test]
fn where_there_are_no_leases_a_lock_proves_what_it_can() {
    let mut files = Files::new();
    files.backing.trial.found.get_mut().unwrap().abilities.fencing = Fencing::Lock;
    let spec = thin("a", 16);
    files.backing.create(&spec).unwrap();
    let other = File::options().read(true).write(true).open(files.path(spec.id)).unwrap();
    assert!(fcntl::lock_all(std::os::fd::AsFd::as_fd(&other)).unwrap());
    assert!(matches!(files.backing.destroy(spec.id), Err(BackingError::InUse { .. })));
    drop(other);
    let proof = files.backing.exclusive(spec.id).unwrap();
    let other = File::options().read(true).write(true).open(files.path(spec.id)).unwrap();
    assert!(!fcntl::lock_all(std::os::fd::AsFd::as_fd(&other)).unwrap());
    files.backing.write_table(&spec, proof.as_ref()).unwrap();
    files.backing.destroy(spec.id).unwrap();
}

#[test]
fn a_path_that_leads_elsewhere_by_now_is_not_handed_out() {
    let files = Files::new();
    files.backing.create(&thin("a", 16)).unwrap();
    let aside = tempfile::tempdir().unwrap();
    let moved = aside.path().join("moved");
    std::fs::rename(files.dir.path(), &moved).unwrap();
    std::fs::create_dir(files.dir.path()).unwrap();
    std::fs::write(files.path(id("a")), "another").unwrap();
    assert!(matches!(files.backing.device(id("a")), Err(BackingError::Missing { .. })));
}

#[test]
fn reading_a_thick_device_is_not_writing_it() {
    let files = Files::new();
    let spec = spec("a", 16, 130, Provisioning::Thick);
    files.backing.create(&spec).unwrap();
    // A guest looks for partitions and labels, finds none, and dies before it makes the pool.
    let mut bytes = vec![0; 1 << 20];
    File::open(files.path(spec.id)).unwrap().read_exact_at(&mut bytes, MIB).unwrap();
    assert!(!files.backing.ever_written(&spec).unwrap());
    // Written, not yet on the disk.
    File::options().write(true).open(files.path(spec.id)).unwrap().write_all_at(&[1; 512], 5 * MIB).unwrap();
    assert!(files.backing.ever_written(&spec).unwrap());
}

#[test]
fn data_at_the_end_of_a_used_disk_survives_growth() {
    let files = Files::new();
    let small = spec("a", 16, 18, Provisioning::Thin);
    files.backing.create(&small).unwrap();
    files.guest_writes(small.id, 2 * MIB);
    // A guest that uses every byte there is.
    files.guest_writes(small.id, 18 * MIB - 4096);
    files.backing.grow(&spec("a", 64, 66, Provisioning::Thin)).unwrap();
    let mut bytes = [0; 4096];
    let file = File::open(files.path(small.id)).unwrap();
    for at in [2 * MIB, 18 * MIB - 4096] {
        file.read_exact_at(&mut bytes, at).unwrap();
        assert_eq!(bytes, [1; 4096], "at {at}");
    }
}

#[test]
fn what_a_guest_takes_past_its_partition_is_seen() {
    let files = Files::new();
    let spec = thin("a", 16);
    files.backing.create(&spec).unwrap();
    let file = File::options().write(true).open(files.path(spec.id)).unwrap();
    let mib = vec![1; MIB as usize];
    let write = |range: std::ops::Range<u64>| range.for_each(|n| file.write_all_at(&mib, n * MIB).unwrap());
    write(1..17);
    file.sync_all().unwrap();
    assert_eq!(files.backing.excess(spec.id).unwrap(), Bytes(0), "all it was promised");
    if files.backing.abilities().unwrap().quota {
        return;
    }
    write(17..40);
    file.sync_all().unwrap();
    files.backing.measure(Duration::ZERO).unwrap();
    let excess = files.backing.excess(spec.id).unwrap();
    assert!(excess > Bytes::mib(20) && excess < Bytes::mib(24), "{excess}");
}

/// A volume in many pieces, and snapshots of it; each volume name its own.
fn in_pieces(files: &Files, name: &str, pieces: u64, snapshots: u64) -> crate::backing::DeviceSpec {
    let spec = thin(name, 16);
    files.backing.create(&spec).unwrap();
    let file = File::options().write(true).open(files.path(spec.id)).unwrap();
    // Every second block, so that no two join.
    (0..pieces).for_each(|n| file.write_all_at(&[1; 4096], 2 * MIB + n * 8192).unwrap());
    file.sync_all().unwrap();
    // Nobody has it: where blocks can't be shared a snapshot is a full copy.
    drop(file);
    for n in 0..snapshots {
        files.backing.snapshot(snapshot_id(&format!("{name}{n}")), &spec, &FULL).unwrap();
    }
    spec
}

fn looks(work: impl FnOnce()) -> u64 {
    let count = || extents::LOOKS.with(std::cell::Cell::get);
    let before = count();
    work();
    count() - before
}

/// Goes on with the upkeep until a round is over.
fn look_around(files: &Files) {
    files.backing.sharing.lock().unwrap().forget();
    while files.backing.look_on().is_some() {}
}

#[test]
fn no_call_looks_who_shares_blocks_however_many_pieces_and_snapshots_there_are() {
    for (pieces, snapshots) in [(1, 1), (400, 1), (400, 8)] {
        let files = Files::new();
        let hostile = in_pieces(&files, "hostile", pieces, snapshots);
        let victim = in_pieces(&files, "victim", 1, 1);
        let looked = looks(|| {
            files.backing.look().unwrap();
            files.backing.measure(Duration::ZERO).unwrap();
            files.backing.capacity().unwrap();
            for spec in [hostile, victim] {
                // What a publication, its statistics and a scrape ask for.
                files.backing.exclusive(spec.id).unwrap();
                files.backing.ever_written(&spec).unwrap();
                files.backing.device(spec.id).unwrap();
                files.backing.allocated(spec.id).unwrap();
                files.backing.excess(spec.id).unwrap();
            }
            files.backing.snapshot(snapshot_id("more"), &victim, &FULL).unwrap();
            files.backing.grow(&thin("victim", 32)).unwrap();
            files.backing.destroy(hostile.id).unwrap();
        });
        assert_eq!(looked, 0, "{pieces} pieces, {snapshots} snapshots");
    }
}

#[test]
fn who_shares_is_looked_at_in_small_steps_and_only_where_something_has_changed() {
    let files = Files::new();
    in_pieces(&files, "a", 400, 2);
    if !files.backing.shares_blocks().unwrap() {
        return;
    }
    let step = || {
        let mut sharing = files.backing.sharing.lock().unwrap();
        sharing.rest();
        files.backing.step(&mut sharing, Duration::ZERO)
    };
    let mut steps = 0;
    while looks(|| assert!(step())) == 1 {
        steps += 1;
        if files.backing.sharing.lock().unwrap().is_over() {
            break;
        }
    }
    assert!(steps >= 3 * 400 / extents::BATCH, "{steps} steps");
    assert_eq!(looks(|| assert!(!step(), "nothing has changed")), 0);
    files.guest_writes(id("a"), 2 * MIB);
    assert_eq!(looks(|| assert!(step())), 1);
}

#[test]
fn what_was_found_is_there_after_a_restart_and_without_it_too_much_counts_as_shared() {
    let files = Files::new();
    let spec = in_pieces(&files, "a", 300, 1);
    if !files.backing.shares_blocks().unwrap() {
        return;
    }
    let borrowed =
        |files: &Files| files.backing.ledger().promises().iter().map(|promised| promised.borrowed()).sum::<u64>();
    let at_first = borrowed(&files);
    // All of it is written anew: nothing is shared any more.
    let file = File::options().write(true).open(files.path(spec.id)).unwrap();
    (0..300).for_each(|n| file.write_all_at(&[2; 4096], 2 * MIB + n * 8192).unwrap());
    file.sync_all().unwrap();
    let files = files.restart();
    assert_eq!(borrowed(&files), at_first, "until it is looked at");
    look_around(&files);
    let found = borrowed(&files);
    assert!(found < at_first - 300 * 4096 + MIB, "{at_first} at first, {found} found");
    let files = files.restart();
    assert_eq!(borrowed(&files), found);
}

/// All of the above once more where files can share blocks: in a mount namespace of its own, in a child.
#[test]
fn all_is_so_where_files_share_blocks() {
    for kind in ["xfs", "btrfs"] {
        let output = Command::new("unshare")
            .args(["--mount", "--propagation", "private"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "backing::file::tests::on_a_file_system_of_its_own", "--ignored", "--nocapture"])
            .env("ZPOD_TEST_WHAT", kind)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{kind} (root is needed): {said}");
        assert!(said.contains("a_snapshot_keeps_what_was_there") && said.contains("shares blocks"), "{said}");
    }
}

#[test]
#[ignore = "what the other test runs in a mount namespace of its own"]
fn on_a_file_system_of_its_own() {
    let kind = std::env::var("ZPOD_TEST_WHAT").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (disk, at) = (dir.path().join("disk"), dir.path().join("mnt"));
    File::create(&disk).unwrap().set_len(16 << 30).unwrap();
    std::fs::create_dir(&at).unwrap();
    let run = |command: &mut Command| assert!(command.status().unwrap().success(), "{command:?}");
    run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&disk));
    run(Command::new("mount").args(["-o", "loop"]).args([&disk, &at]));
    if FileBacking::open(&at, 1.0).unwrap().shares_blocks().unwrap() {
        println!("shares blocks");
    }
    // One at a time: they all look at the room there is.
    run(Command::new(std::env::current_exe().unwrap())
        .args(["backing::file::tests::", "--test-threads=1", "--skip", "all_is_so_where_files_share_blocks"])
        .env("TMPDIR", &at));
    run(Command::new("umount").arg(&at));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    /// The file backing and the simulated one answer alike, whatever is asked of them in whatever order.
    #[test]
    fn files_behave_as_the_simulation_does(calls in proptest::collection::vec((0u8..11, 0u8..3, 1u64..5, 0u8..3), 1..40), order: u64) {
        let files = Files::new();
        let sim = super::super::sim::SimBacking::new(Bytes::gib(64), 1.0);
        let sim = if files.backing.shares_blocks().unwrap() { sim } else { sim.without_sharing() };
        for (call, volume, size, other) in calls {
            let name = volume.to_string();
            let (mib, snapshot) = (Bytes::mib(size * 2), snapshot_id(&other.to_string()));
            let spec = spec(&name, size * 4, size * 4 + 2 + (size % 2) * 16, Provisioning::Thin);
            let both: [&dyn Backing; 2] = [&files.backing, &sim];
            let run = |backing: &dyn Backing| -> Result<String, BackingError> {
                Ok(match call {
                    0 => format!("{:?}", backing.create(&spec)?),
                    1 => format!("{:?}", backing.destroy(spec.id)?),
                    2 | 3 => format!("{:?}", backing.grow(&spec)?),
                    4 => backing.ever_written(&spec)?.to_string(),
                    6 => format!("{:?}", backing.snapshot(snapshot, &spec, &FULL)?),
                    7 => format!("{:?}", backing.destroy_snapshot(snapshot)?),
                    8 => format!("{:?}", backing.create_from(&spec, CopySource::Snapshot(snapshot), mib, &FULL)?),
                    9 => format!("{:?}", backing.create_from(&spec, CopySource::Device(id(&other.to_string())), mib, &FULL)?),
                    _ => {
                        let proof = backing.exclusive(spec.id)?;
                        backing.write_table(&spec, proof.as_ref())?;
                        "written".to_owned()
                    }
                })
            };
            let kind = |result: Result<String, BackingError>| match result {
                Ok(text) => text,
                Err(BackingError::Mismatch { found, wanted, .. }) => format!("mismatch {found} {wanted}"),
                Err(BackingError::Missing { .. }) => "missing".to_owned(),
                Err(BackingError::SnapshotMissing { .. }) => "snapshot missing".to_owned(),
                Err(BackingError::Io { source, .. }) => format!("{:?}", source.kind()),
                Err(error) => format!("{error:?}"),
            };
            if call == 10 && files.path(spec.id).exists() {
                files.guest_rewrites(spec.id, 2 * MIB);
                sim.write(spec.id, 2 * MIB, 4096);
                continue;
            }
            let [ours, theirs] = both.map(|backing| kind(run(backing)));
            prop_assert_eq!(ours, theirs);
            prop_assert_eq!(sim.table(spec.id).is_some(), files.path(spec.id).exists());
            if let Some(table) = sim.table(spec.id) {
                prop_assert_eq!(table, files.table(spec.id));
                let both: [&dyn Rig; 2] = [&files, &sim];
                let [ours, theirs] = both.map(|rig| rig.contents(spec.id, 2 * MIB) != 0);
                prop_assert_eq!(ours, theirs, "{} {:?}", call, spec.id);
            }
        }
        // Whatever there is goes, in any order, and leaves nothing.
        let mut left: Vec<u8> = (0..6).collect();
        let (both, mut order): ([&dyn Backing; 2], _) = ([&files.backing, &sim], order);
        while !left.is_empty() {
            let at = left.remove((order % left.len() as u64) as usize);
            order = order.rotate_right(7);
            for backing in both {
                match at {
                    0..3 => drop(backing.destroy(id(&at.to_string())).unwrap()),
                    _ => drop(backing.destroy_snapshot(snapshot_id(&(at - 3).to_string())).unwrap()),
                }
            }
        }
        prop_assert_eq!((files.promised(), files.names()), (0, vec![]));
        let capacity = sim.capacity().unwrap();
        prop_assert_eq!((capacity.total, capacity.available), (Bytes::gib(64), Bytes::gib(64)));
    }
}
