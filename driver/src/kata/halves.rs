use std::fmt;
use std::path::{Path, PathBuf};

use zpod_storage::backing::Outcome;
use zpod_storage::crash;
use zpod_volume::{Bytes, VolumeId};

use super::{KataError, LoopDevice, Mapper, MapperError, Removal};

/// What makes one device of the two images of a mirrored volume.
pub trait Halves: Send + Sync + fmt::Debug {
    /// The path of a volume's device, whether or not it is there.
    fn path(&self, id: VolumeId) -> PathBuf;

    /// Makes the device of two images, the first `half` bytes of each. `None` stands for one that is lost. A device that
    /// is there stays as it is.
    ///
    /// # Errors
    /// When the operating system refuses.
    fn join(&self, id: VolumeId, images: [Option<&Path>; 2], half: Bytes, discard: bool) -> Result<Outcome, KataError>;

    /// Removes the device of a volume, at once or with its last user, and lets go of its images.
    ///
    /// # Errors
    /// [`MapperError::InUse`] while somebody has it, where it is to go at once.
    fn part(&self, id: VolumeId, images: [Option<&Path>; 2], when: Removal) -> Result<Outcome, KataError>;
}

/// A loop device for each image, and a device of the two upon them.
#[derive(Debug, Clone)]
pub struct MappedHalves(Mapper);

impl MappedHalves {
    /// With the host's device-mapper.
    ///
    /// # Errors
    /// Where there is none, or its tool is missing.
    pub fn open() -> Result<Self, MapperError> {
        Mapper::open().map(Self)
    }
}

impl Halves for MappedHalves {
    fn path(&self, id: VolumeId) -> PathBuf {
        Mapper::path(id)
    }

    fn join(&self, id: VolumeId, images: [Option<&Path>; 2], half: Bytes, discard: bool) -> Result<Outcome, KataError> {
        let mut devices = [None, None];
        for (device, image) in devices.iter_mut().zip(images) {
            let Some(image) = image else { continue };
            let (attached, _) = LoopDevice::attach(image, discard)?;
            crash::point("mirror: loop device attached");
            *device = Some(attached);
        }
        let devices = devices.each_ref().map(|device| device.as_ref().map(LoopDevice::path));
        Ok(self.0.map(id, devices, half)?)
    }

    fn part(&self, id: VolumeId, images: [Option<&Path>; 2], when: Removal) -> Result<Outcome, KataError> {
        let mut outcome = self.0.unmap(id, when)?;
        // Those that the device still has go with it.
        for image in images.into_iter().flatten() {
            if LoopDevice::detach(image)? == Outcome::Changed {
                outcome = Outcome::Changed;
            }
        }
        Ok(outcome)
    }
}
