use kube::api::ListParams;
use zpod_storage::catalog::CatalogError;
use zpod_volume::{GroupId, SnapshotId, VolumeId};

use super::{KubeCatalog, PAGE};
use crate::crd::ZfsSnapshot;

impl KubeCatalog<ZfsSnapshot> {
    /// Allows the copy to be made: all guests of the group have marked the instant.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn want_copy(&self, object: &ZfsSnapshot) -> Result<ZfsSnapshot, CatalogError> {
        self.ask(object, |spec| spec.copy = true).await
    }

    /// Says that the group of this snapshot is complete, which is never taken back.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn want_complete(&self, object: &ZfsSnapshot) -> Result<ZfsSnapshot, CatalogError> {
        self.ask(object, |spec| spec.complete = true).await
    }

    /// A page of the snapshots of one volume, as [`KubeCatalog::page`].
    ///
    /// # Errors
    /// As [`KubeCatalog::page`].
    pub async fn page_of_volume(
        &self,
        id: VolumeId,
        token: Option<&str>,
        limit: u32,
    ) -> Result<(Vec<ZfsSnapshot>, Option<String>), CatalogError> {
        self.page_of(ListParams::default().limit(limit).fields(&format!("spec.volume={id}")), token).await
    }

    /// The snapshots of a group, or of all groups, by what the controller has written in their spec.
    ///
    /// # Errors
    /// When the API server can't be asked.
    pub async fn in_group(&self, group: Option<GroupId>) -> Result<Vec<ZfsSnapshot>, CatalogError> {
        let group = group.map(|group| group.to_string());
        let selector = match &group {
            Some(group) => format!("spec.group.id={group}"),
            None => "spec.group.id!=".to_owned(),
        };
        let wanted = |object: &ZfsSnapshot| {
            object.spec.group.as_ref().is_some_and(|of| group.as_ref().is_none_or(|group| *group == of.id))
        };
        let (mut members, mut token) = (Vec::new(), None::<String>);
        loop {
            let params = ListParams::default().limit(PAGE).fields(&selector);
            let (objects, next) = self.page_of(params, token.as_deref()).await?;
            members.extend(objects.into_iter().filter(wanted));
            token = next;
            if token.is_none() {
                return Ok(members);
            }
        }
    }

    /// Says how far a full copy is, in percent.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn progress(&self, id: SnapshotId, percent: u64) -> Result<(), CatalogError> {
        self.say(id, |_, status| status.progress = Some(i64::try_from(percent).unwrap_or(100))).await
    }
}
