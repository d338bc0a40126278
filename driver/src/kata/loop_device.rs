use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use zpod_storage::backing::Outcome;
use zpod_storage::crash;

use super::KataError;

mod ioctl;

const CONTROL: &str = "/dev/loop-control";
const DEVICES: &str = "/sys/block";
/// Somebody else may take the free device first.
const TRIES: u32 = 64;

/// The loop device of an image: what a pod gets as a block device has to be one on the host too.
///
/// # Design
/// Which image a device has is asked of the kernel each time and never remembered: by the image's file, not by its path,
/// which is another one in each mount namespace and gone where that is gone. A device that is detached while somebody
/// has it open (kubelet lays a loop device of its own on top) goes with the last of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// The device of an image, attached now where there is none. Never partitioned on the host: nothing there reads what
    /// the guest wrote. Writes go past the host's page cache where the file system lets them. With `discards` those of the
    /// guest may punch holes into the image.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn attach(image: &Path, discards: bool) -> Result<(Self, Outcome), KataError> {
        let (device, outcome) = Self::attach_any(image, discards)?;
        if !discards {
            device.forbid_discards()?;
        }
        Ok((device, outcome))
    }

    fn attach_any(image: &Path, discards: bool) -> Result<(Self, Outcome), KataError> {
        if let Some((device, file)) = attached(image)?.into_iter().next() {
            device.keep(&file)?;
            return Ok((device, Outcome::Unchanged));
        }
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
        let backing = open(image).map_err(KataError::io("open", image))?;
        let control = open(Path::new(CONTROL)).map_err(KataError::io("open", Path::new(CONTROL)))?;
        for _ in 0..TRIES {
            let number =
                ioctl::free(&control).map_err(KataError::os("ask for a free device at", Path::new(CONTROL)))?;
            crash::point("loop device found");
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = open(&path).map_err(KataError::io("open", &path))?;
            let device = Self { path: path.clone() };
            match ioctl::configure(&file, &backing) {
                // A device keeps that limit when it is detached, and the kernel never raises it again: another one then,
                // or this one made anew.
                Ok(()) if discards && device.forbids_discards()? => {
                    ioctl::detach(&file).map_err(KataError::os("detach", &path))?;
                    drop(file);
                    if let Err(error) = ioctl::remove(&control, number) {
                        tracing::debug!(device = %path.display(), %error, "not made anew");
                    }
                }
                Ok(()) => return Ok((device, Outcome::Changed)),
                Err(Errno::BUSY) => {}
                Err(error) => return Err(KataError::os("attach the volume's image to", &path)(error)),
            }
        }
        Err(KataError::io("find a free loop device at", Path::new(CONTROL))(io::ErrorKind::ResourceBusy.into()))
    }

    /// One that was to go with its last user stays.
    fn keep(&self, file: &File) -> Result<(), KataError> {
        let status = ioctl::status(file).map_err(KataError::os("look at", &self.path))?;
        if status.autoclear() {
            ioctl::stay(file, status).map_err(KataError::os("keep", &self.path))?;
        }
        Ok(())
    }

    /// Keeps the guest's discards from the image, which would punch holes into it.
    fn forbid_discards(&self) -> Result<(), KataError> {
        let path = self.queue("discard_max_bytes");
        fs::write(&path, "0").map_err(KataError::io("write", &path))
    }

    /// Whether discards that could reach the image are kept from it.
    fn forbids_discards(&self) -> Result<bool, KataError> {
        let read = |path: PathBuf| fs::read_to_string(&path).map_err(KataError::io("read", &path));
        let none = |text: String| text.trim() == "0";
        Ok(none(read(self.queue("discard_max_bytes"))?) && !none(read(self.queue("discard_max_hw_bytes"))?))
    }

    fn queue(&self, limit: &str) -> PathBuf {
        Path::new(DEVICES).join(self.path.file_name().unwrap_or(OsStr::new(""))).join("queue").join(limit)
    }

    /// Detaches every device of an image: at once, or with their last users. An image that is gone has none.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn detach(image: &Path) -> Result<Outcome, KataError> {
        let mut outcome = Outcome::Unchanged;
        for (device, file) in attached(image)? {
            match ioctl::detach(&file) {
                Ok(()) => outcome = Outcome::Changed,
                // It has gone by itself.
                Err(Errno::NXIO) => {}
                Err(error) => return Err(KataError::os("detach", &device.path)(error)),
            }
            drop(file);
            crash::point("loop device detached");
        }
        Ok(outcome)
    }

    /// Detaches every device of an image that nobody has open. Gives one that somebody has, which stays as it was.
    ///
    /// The kernel has no other question for that: a device that is told to go while somebody has it open goes with its
    /// last user, and until then it can be told to stay.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn detach_unused(image: &Path) -> Result<Option<Self>, KataError> {
        Self::detach(image)?;
        let mut used = None;
        for (device, file) in attached(image)? {
            device.keep(&file)?;
            used = Some(device);
        }
        Ok(used)
    }

    /// The device's node.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The devices that have this image, open.
fn attached(image: &Path) -> Result<Vec<(LoopDevice, File)>, KataError> {
    let (Some(name), Ok(found)) = (image.file_name(), fs::metadata(image)) else { return Ok(Vec::new()) };
    let entries = fs::read_dir(DEVICES).map_err(KataError::io("read", Path::new(DEVICES)))?;
    let mut devices = Vec::new();
    for entry in entries.flatten() {
        let device = entry.file_name();
        // There is a path here only while a file is attached; its last part is the same in every mount namespace.
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if Path::new(backing.trim_end_matches('\n')).file_name() != Some(name) {
            continue;
        }
        let path = Path::new("/dev").join(&device);
        let file = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file,
            // It goes at this moment.
            Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => continue,
            Err(error) => return Err(KataError::io("open", &path)(error)),
        };
        match ioctl::status(&file) {
            Ok(status) if status.is_of(found.dev(), found.ino()) => devices.push((LoopDevice { path }, file)),
            Ok(_) | Err(Errno::NXIO) => {}
            Err(error) => return Err(KataError::os("look at", &path)(error)),
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt as _;

    fn image(dir: &Path, name: &str) -> PathBuf {
        let path = dir.join(name);
        File::create(&path).unwrap().set_len(4 << 20).unwrap();
        path
    }

    #[test]
    fn a_device_is_attached_once_found_again_under_any_path_and_detached() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "a-volume-of-the-loop-test.img");
        let (device, outcome) = LoopDevice::attach(&path, false).unwrap();
        assert_eq!(outcome, Outcome::Changed);
        assert_eq!(LoopDevice::attach(&path, false).unwrap(), (device.clone(), Outcome::Unchanged));
        assert!(device.forbids_discards().unwrap());
        let file = OpenOptions::new().read(true).write(true).open(device.path()).unwrap();
        file.write_all_at(b"through the device", 4096).unwrap();
        file.sync_all().unwrap();
        drop(file);
        assert_eq!(&fs::read(&path).unwrap()[4096..4114], b"through the device");

        // Another image of that name is another image.
        let elsewhere = tempfile::tempdir().unwrap();
        let other = image(elsewhere.path(), "a-volume-of-the-loop-test.img");
        assert_eq!(LoopDevice::detach(&other).unwrap(), Outcome::Unchanged);
        fs::create_dir(dir.path().join("moved")).unwrap();
        let moved = dir.path().join("moved/a-volume-of-the-loop-test.img");
        fs::rename(&path, &moved).unwrap();
        assert_eq!(LoopDevice::detach(&moved).unwrap(), Outcome::Changed);
        // It may well be the same device.
        let (next, _) = LoopDevice::attach(&other, true).unwrap();
        assert!(!next.forbids_discards().unwrap(), "{next:?} has kept the limit of another image");
        assert_eq!(LoopDevice::detach(&other).unwrap(), Outcome::Changed);
        assert_eq!(LoopDevice::detach(&moved).unwrap(), Outcome::Unchanged);
        assert_eq!(LoopDevice::detach(&path).unwrap(), Outcome::Unchanged);
    }

    #[test]
    fn a_device_that_somebody_has_open_goes_with_him_unless_it_is_wanted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "a-busy-volume-of-the-loop-test.img");
        let (device, _) = LoopDevice::attach(&path, true).unwrap();
        let user = File::open(device.path()).unwrap();
        assert_eq!(LoopDevice::detach(&path).unwrap(), Outcome::Changed);
        assert_eq!(attached(&path).unwrap().len(), 1, "it is there as long as it is open");
        assert_eq!(LoopDevice::attach(&path, true).unwrap(), (device.clone(), Outcome::Unchanged));
        drop(user);
        assert_eq!(attached(&path).unwrap().len(), 1, "and stays");
        assert_eq!(LoopDevice::detach(&path).unwrap(), Outcome::Changed);
        assert_eq!(attached(&path).unwrap().len(), 0);
    }

    #[test]
    fn only_a_device_that_nobody_has_open_is_detached_as_unused_and_any_other_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = image(dir.path(), "a-contested-volume-of-the-loop-test.img");
        assert_eq!(LoopDevice::detach_unused(&path).unwrap(), None);
        let (device, _) = LoopDevice::attach(&path, true).unwrap();
        let user = File::open(device.path()).unwrap();
        // Also one that was to go with its last user: it is wanted, or this would not be asked.
        for _ in 0..2 {
            assert_eq!(LoopDevice::detach_unused(&path).unwrap(), Some(device.clone()));
            let found = attached(&path).unwrap();
            assert!(found.len() == 1 && !ioctl::status(&found[0].1).unwrap().autoclear(), "{found:?}");
            drop(found);
            assert_eq!(LoopDevice::detach(&path).unwrap(), Outcome::Changed);
        }
        // Kubelet's on top of it is a user, whether or not somebody has that one open.
        assert_eq!(LoopDevice::detach_unused(&path).unwrap(), Some(device.clone()));
        let (upper, _) = LoopDevice::attach(device.path(), true).unwrap();
        drop(user);
        assert_eq!(LoopDevice::detach_unused(&path).unwrap(), Some(device.clone()));
        let machine = File::open(upper.path()).unwrap();
        assert_eq!(LoopDevice::detach_unused(&path).unwrap(), Some(device.clone()));
        assert_eq!(LoopDevice::detach(device.path()).unwrap(), Outcome::Changed);
        assert_eq!(LoopDevice::detach_unused(&path).unwrap(), Some(device));
        drop(machine);
        assert_eq!(LoopDevice::detach_unused(&path).unwrap(), None);
        assert_eq!(attached(&path).unwrap().len(), 0);
    }
}
