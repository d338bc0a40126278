use std::collections::HashMap;
use std::fmt;

use zeroize::{Zeroize as _, Zeroizing};
use zpod_volume::VolumeId;

use crate::volumes::VolumeError;

/// The secret's key with the volume's key.
const KEY: &str = "encryptionKey";
/// The secret's key with the key before it.
const PREVIOUS: &str = "previousEncryptionKey";
/// The request's field.
const FIELD: &str = "secrets";
/// OpenZFS, zfs-load-key(8): "passphrase ... must be between 8 and 512 bytes long".
const PASSPHRASE: std::ops::RangeInclusive<usize> = 8..=512;
/// A key as it is.
const RAW: usize = 32;

/// Bytes that nobody gets to see: overwritten when they are dropped, with no text form.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// These bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// For the wire.
    pub fn reveal(&self) -> &[u8] {
        &self.0
    }

    /// The same text without this secret in it, however often it is there.
    pub fn cut_from(&self, text: &str) -> String {
        match std::str::from_utf8(&self.0) {
            Ok(secret) if !secret.is_empty() => text.replace(secret, "***"),
            _ => text.to_owned(),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(***)")
    }
}

/// The key of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPair {
    /// The key it is to have.
    pub key: Secret,
    /// The one before, where the key is being changed.
    pub previous: Option<Secret>,
}

impl KeyPair {
    /// Takes the keys out of a request's secrets, which are overwritten. `None` where there are none.
    ///
    /// # Errors
    /// When a key is none: the error names the volume and the secret's key, and says what is allowed.
    pub fn take(id: VolumeId, mut secrets: HashMap<String, String>) -> Result<Option<Self>, VolumeError> {
        let mut part = |name: &'static str| match secrets.remove(name) {
            Some(text) => check(id, name, Secret::new(text.into_bytes())).map(Some),
            None => Ok(None),
        };
        let taken = match (part(KEY), part(PREVIOUS)) {
            (Ok(Some(key)), Ok(previous)) => {
                let previous = previous.filter(|previous| *previous != key);
                Ok(Some(Self { key, previous }))
            }
            (Ok(None), Ok(None)) => Ok(None),
            (Ok(None), Ok(Some(_))) => {
                let reason = format!("volume {id}: the secret has {PREVIOUS:?} without {KEY:?}, the key to change to");
                Err(VolumeError::invalid(FIELD, reason))
            }
            (Err(error), _) | (_, Err(error)) => Err(error),
        };
        secrets.values_mut().for_each(|value| value.zeroize());
        taken
    }

    /// The same text with neither of the keys in it.
    pub fn cut_from(&self, text: &str) -> String {
        let text = self.key.cut_from(text);
        self.previous.as_ref().map_or(text.clone(), |previous| previous.cut_from(&text))
    }
}

/// 32 bytes are a key as it is and 64 hexadecimal digits are one too; anything else is a passphrase.
fn check(id: VolumeId, name: &str, key: Secret) -> Result<Secret, VolumeError> {
    let (bytes, length) = (key.reveal(), key.reveal().len());
    let allowed = format!("64 hexadecimal digits, exactly {RAW} bytes, or a passphrase of 8 to 512 bytes, is allowed");
    if length == RAW {
        return Ok(key);
    }
    if !PASSPHRASE.contains(&length) {
        let reason = format!("volume {id}: {name:?} in the secret has {length} bytes; {allowed}");
        return Err(VolumeError::invalid(FIELD, reason));
    }
    // zfs(8) reads a passphrase up to the end of its line: what is behind it would be lost, and a file's last line break
    // would be part of the key here and not there.
    if bytes.iter().any(u8::is_ascii_control) {
        let reason = format!(
            "volume {id}: {name:?} in the secret has a line break or another control character; {allowed}: make it without \
             (kubectl create secret generic NAME --from-literal={name}=..., or printf instead of echo)"
        );
        return Err(VolumeError::invalid(FIELD, reason));
    }
    Ok(key)
}

/// The error for an encrypted volume whose publication brings no key.
pub(in crate::volumes) fn missing(id: VolumeId) -> VolumeError {
    let reason = format!(
        "volume {id} is encrypted, and no {KEY:?} came with the request: make a Secret with the key {KEY}, and name it in \
         the StorageClass by csi.storage.k8s.io/node-publish-secret-name and csi.storage.k8s.io/node-publish-secret-namespace \
         (a volume takes them over when it is made)"
    );
    VolumeError::invalid(FIELD, reason)
}

/// The error for a key that comes for a volume that has none: somebody believes that it is encrypted.
pub(in crate::volumes) fn not_encrypted(id: VolumeId) -> VolumeError {
    let reason = format!(
        "volume {id} is not encrypted, but {KEY:?} came with the request: a volume is encrypted from its beginning or not \
         at all; make a new one from a StorageClass with encryption: aes-256-gcm, or leave the secret out"
    );
    VolumeError::invalid(FIELD, reason)
}

pub(super) fn changed_without_previous(id: VolumeId) -> VolumeError {
    let reason = format!(
        "volume {id} runs on another key than the {KEY:?} that came, and {PREVIOUS:?} is not the one it runs on; to change \
         the key, put the old one into the secret as {PREVIOUS}; nothing was changed"
    );
    VolumeError::invalid(FIELD, reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pairs: &[(&str, &str)]) -> Result<Option<KeyPair>, VolumeError> {
        let secrets = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        KeyPair::take(VolumeId::from_name("a"), secrets)
    }

    #[test]
    fn the_three_forms_of_a_key_are_taken() {
        for key in ["f".repeat(64), "x".repeat(32), "y\n".repeat(16), "correct horse".into(), "ü".repeat(256)] {
            let pair = take(&[(KEY, &key), ("unrelated", "x")]).unwrap().unwrap();
            assert_eq!((pair.key.reveal(), pair.previous), (key.as_bytes(), None));
        }
        assert_eq!(take(&[("unrelated", "x")]).unwrap(), None);
        let same = take(&[(KEY, "correct horse"), (PREVIOUS, "correct horse")]).unwrap().unwrap();
        assert_eq!(same.previous, None, "a change to itself is none");
    }

    #[test]
    fn what_is_no_key_is_refused_by_name_and_never_shown() {
        for (pairs, want) in [
            (&[(KEY, "hunter2")][..], "\"encryptionKey\" in the secret has 7 bytes"),
            (&[(KEY, "")], "has 0 bytes"),
            (&[(KEY, "hunter2hunter2\n")], "line break"),
            (&[(KEY, "correct horse"), (PREVIOUS, "hunter2")], "\"previousEncryptionKey\" in the secret has 7 bytes"),
            (&[(PREVIOUS, "hunter2hunter2")], "without \"encryptionKey\""),
        ] {
            let error = take(pairs).unwrap_err().to_string();
            assert!(error.starts_with("secrets: volume ") && error.contains(want), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert!(take(&[(KEY, &"x".repeat(513))]).is_err());
    }

    #[test]
    fn a_guest_that_repeats_a_key_does_not_get_it_into_a_log() {
        let pair = take(&[(KEY, "correct horse"), (PREVIOUS, "battery staple")]).unwrap().unwrap();
        let said = pair.cut_from("key correct horse does not fit, battery staple neither, correct horse");
        assert_eq!(said, "key *** does not fit, *** neither, ***");
    }
}
