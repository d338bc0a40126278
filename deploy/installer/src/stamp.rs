//! What an installed version was made of, and what it consists of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zpod_image::cache;
use zpod_image::manifest::Output;

use crate::guest::Guest;
use crate::kata::Identity;

/// Grows when an older installer couldn't read it any more.
const FORMAT: u32 = 1;

/// `manifest.json` of an installed version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp {
    /// Of this file.
    pub format: u32,
    /// The version of the installer.
    pub installer: String,
    /// Kata's initrd, as it was then.
    pub kata: Identity,
    /// What it held.
    pub kata_initrd: Output,
    /// Kata's version, if it could be found out.
    pub kata_version: Option<String>,
    /// Our kernel's release, if it was known.
    pub kernel_release: Option<String>,
    /// Our kernel.
    pub kernel: Output,
    /// Our overlay.
    pub overlay: Output,
    /// What is there: size and hash by name.
    pub files: BTreeMap<String, Output>,
}

impl Stamp {
    /// Describes a version that was made now.
    #[must_use]
    pub fn new(
        guest: &Guest,
        kata: Identity,
        kata_initrd: Output,
        kata_version: Option<String>,
        files: BTreeMap<String, Output>,
    ) -> Self {
        Self {
            format: FORMAT,
            installer: env!("CARGO_PKG_VERSION").to_owned(),
            kata,
            kata_initrd,
            kata_version,
            kernel_release: guest.kernel_release.clone(),
            kernel: guest.kernel.clone(),
            overlay: guest.overlay.clone(),
            files,
        }
    }

    /// Reads one.
    ///
    /// # Errors
    /// It is none, or of a format that this installer doesn't know.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let stamp: Self = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if stamp.format == FORMAT { Ok(stamp) } else { Err(format!("it has format {}", stamp.format)) }
    }

    /// The name of the version: the same inputs have the same one.
    #[must_use]
    pub fn id(&self) -> String {
        cache::key([&self.kernel.sha256, &self.overlay.sha256, &self.kata_initrd.sha256].map(String::as_str))
    }

    /// Whether it was made from this guest.
    #[must_use]
    pub fn is_of(&self, guest: &Guest) -> bool {
        self.kernel == guest.kernel && self.overlay == guest.overlay
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stamp(kernel: &[u8], overlay: &[u8], initrd: &[u8]) -> Stamp {
        let kata = Identity {
            path: "/a".into(),
            real_path: "/b".into(),
            inode: 1,
            bytes: 2,
            modified: (3, 4),
            changed: (5, 6),
        };
        Stamp {
            format: FORMAT,
            installer: "0.1.0".to_owned(),
            kata,
            kata_initrd: Output::of(initrd),
            kata_version: None,
            kernel_release: None,
            kernel: Output::of(kernel),
            overlay: Output::of(overlay),
            files: BTreeMap::new(),
        }
    }

    #[test]
    fn a_stamp_of_another_format_is_not_taken_for_ours() {
        let mut stamp = stamp(b"1", b"2", b"3");
        assert_eq!(Stamp::parse(&serde_json::to_vec(&stamp).unwrap()), Ok(stamp.clone()));
        stamp.format = 2;
        assert!(Stamp::parse(&serde_json::to_vec(&stamp).unwrap()).is_err());
        assert!(Stamp::parse(b"{}").is_err());
    }

    proptest! {
        #[test]
        fn a_version_has_another_name_when_any_input_has_other_bytes(
            one in any::<[[u8; 2]; 3]>(), other in any::<[[u8; 2]; 3]>(),
        ) {
            let id = |[kernel, overlay, initrd]: [[u8; 2]; 3]| stamp(&kernel, &overlay, &initrd).id();
            prop_assert_eq!(id(one) == id(other), one == other);
        }
    }
}
