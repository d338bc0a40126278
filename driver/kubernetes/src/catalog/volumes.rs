use zpod_storage::catalog::CatalogError;
use zpod_volume::{Bytes, VolumeAttributes};

use super::KubeCatalog;
use crate::Quantity;
use crate::crd::ZfsVolume;

impl KubeCatalog<ZfsVolume> {
    /// Asks for another capacity. The node then finds the room, or says in the condition `Expanded` why it can't.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn want_capacity(&self, object: &ZfsVolume, capacity: Bytes) -> Result<ZfsVolume, CatalogError> {
        // Volumes never shrink: whoever asked for more in the meantime gets it.
        self.ask(object, |spec| spec.capacity = Quantity(spec.capacity.0.max(capacity))).await
    }

    /// Asks for other attributes, on top of those that were asked for before. The node then takes them over, or says in
    /// the condition `Modified` why it can't.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn want_attributes(
        &self,
        object: &ZfsVolume,
        changes: &VolumeAttributes,
    ) -> Result<ZfsVolume, CatalogError> {
        let changes = || changes.iter().map(|(key, value)| (key.to_owned(), value.to_owned()));
        self.ask(object, |spec| spec.attributes.extend(changes())).await
    }
}
