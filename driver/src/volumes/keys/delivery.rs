use std::time::Duration;

use uuid::Uuid;
use zpod_volume::VolumeId;

use crate::guest::{GuestClient, GuestError, VolumeReport};
use crate::volumes::VolumeError;
use crate::volumes::publish::NodeVolumes;

/// A guest that could not be reached is tried again after this long ...
const RETRY: Duration = Duration::from_secs(1);
/// ... this many times; then its next report begins it anew.
const TRIES: u32 = 60;
const BUSY_STEP: Duration = Duration::from_millis(50);

impl NodeVolumes {
    /// What is wrong with the key of a volume whose guest says this, for a person.
    pub(in crate::volumes) fn key_trouble(&self, report: &VolumeReport) -> Option<String> {
        let trouble = self.keys.trouble(report.id);
        let missing = report.awaits_key && !self.keys.knows(report.id);
        trouble.or_else(|| {
            missing.then(|| {
                "the guest waits for its key, which comes with the next NodePublishVolume: the CSIDriver object must have \
                 requiresRepublish: true, and the Secret must exist"
                    .to_owned()
            })
        })
    }

    /// Gives a guest that was just heard the key it waits for, or the one that takes the place of its own.
    pub(in crate::volumes) fn provide_key_if_wanted(&self, guest: &GuestClient, report: &VolumeReport) {
        let (id, token) = (report.id, report.token);
        let changes = report.encrypted && report.health.is_imported() && self.keys.replaces(id, token);
        if !(report.awaits_key || changes) || !self.keys.knows(id) {
            return;
        }
        let (node, guest) = (self.clone(), guest.clone());
        tokio::spawn(async move {
            for _ in 0..TRIES {
                match node.provide_key(&guest, id, token).await {
                    // It has it, or it said no: another try with the same key would end the same.
                    Ok(()) | Err(VolumeError::Guest { source: GuestError::Refused { .. }, .. }) => return,
                    Err(error) => tracing::info!(volume = %id, "the key could not be given yet: {error}"),
                }
                tokio::time::sleep(RETRY).await;
                let waits = node.context.published.heard(id).is_some_and(|heard| {
                    heard.report.token == token && heard.guest.sandbox() == guest.sandbox() && heard.report.awaits_key
                });
                if !waits {
                    return;
                }
            }
        });
    }

    /// Gives a running guest the key that a repeated publication brought, where it is another one.
    ///
    /// # Errors
    /// When the guest did not take it. It goes on with the key it has.
    pub(in crate::volumes) async fn change_key_in_guest(&self, id: VolumeId) -> Result<(), VolumeError> {
        let Some(heard) = self.context.published.heard(id) else { return Ok(()) };
        let token = heard.report.token;
        // A report may have led to the same.
        while self.keys.is_busy(id) {
            tokio::time::sleep(BUSY_STEP).await;
        }
        // What was heard may be older than the key.
        let wanted = heard.report.awaits_key || self.keys.replaces(id, token);
        if !wanted || self.keys.has_taken(id, token) {
            return Ok(());
        }
        self.provide_key(&heard.guest, id, token).await
    }

    async fn provide_key(&self, guest: &GuestClient, id: VolumeId, token: Uuid) -> Result<(), VolumeError> {
        let Some(pair) = self.keys.begin(id, token) else { return Ok(()) };
        let answer = guest.provide_key(id, token, &pair).await;
        let trouble = answer.as_ref().err().map(|error| match error {
            GuestError::Refused { .. } => format!("its key was not taken: {error}"),
            error => format!("its key could not be given to its guest: {error}"),
        });
        self.keys.end(id, token, &pair, trouble.clone());
        match answer {
            Ok(changed) => {
                tracing::info!(volume = %id, sandbox = guest.sandbox(), changed, "the guest has its key");
                Ok(())
            }
            Err(source) => {
                if let GuestError::Refused { .. } = source {
                    tracing::warn!(volume = %id, "{}", trouble.unwrap_or_default());
                }
                Err(VolumeError::Guest { id, source })
            }
        }
    }
}
