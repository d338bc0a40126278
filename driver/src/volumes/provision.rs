use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use zpod_storage::backing::{BackingError, CopySource, Outcome};
use zpod_storage::catalog::{CatalogError, Condition, Created, Phase, Source, Volume};
use zpod_storage::crash;
use zpod_volume::{Bytes, DiskLayout, Vdevs, VolumeAttributes, VolumeId, VolumeMode, VolumeParameters};

use super::access::check_access;
use super::context::{deleting, device_spec, to_the_end};
use super::copies::Target;
use super::lock::VolumeLock;
use super::mirror::check_vdevs;
use super::modify::{check, modify};
use super::publish::NodeVolumes;
use super::{CapacityRange, Context, VolumeError, clone};
use crate::kata::Removal;

/// The topology key: the node whose backing store holds a volume.
pub const TOPOLOGY_KEY: &str = "csi.zpod.storage/node";

/// Records are looked through this many at a time.
const SCAN: usize = 256;
/// How long CreateVolume waits for a full copy before it says how far that is.
const COPY_PATIENCE: Duration = Duration::from_secs(5);

/// Makes, deletes, grows and lists volumes: in this process ([`Provisioner`]), or through the cluster.
#[async_trait]
pub trait Provision: Send + Sync + fmt::Debug + 'static {
    /// Makes a volume, or finishes one that was begun; one that is there already and fits is the answer too.
    ///
    /// # Errors
    /// When it can't be had, or differs from what is there under that name.
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumeError>;

    /// Deletes a volume. One that does not exist is deleted already.
    ///
    /// # Errors
    /// While it is published or a virtual machine has it.
    async fn delete(&self, id: VolumeId) -> Result<Outcome, VolumeError>;

    /// Promises a volume more room and records it. Never shrinks. The node then carries it out.
    ///
    /// # Errors
    /// When there is no room, or the size can't be had.
    async fn expand(&self, id: VolumeId, range: CapacityRange) -> Result<Volume, VolumeError>;

    /// Changes what of a volume can change while it lives; what is not named stays. Takes effect in a running guest, and
    /// in the next one.
    ///
    /// # Errors
    /// When the volume does not exist or can't have them, or its guest refuses.
    async fn modify(&self, id: VolumeId, changes: VolumeAttributes) -> Result<Volume, VolumeError>;

    /// A volume, and its condition.
    ///
    /// # Errors
    /// When it does not exist.
    async fn get(&self, id: VolumeId) -> Result<Volume, VolumeError>;

    /// A page of volumes, from where an earlier page said the next one begins. Those that are not finished are left out.
    ///
    /// # Errors
    /// When the catalog can't be read, or the token is none of ours.
    async fn list(&self, from: Option<String>, limit: usize) -> Result<VolumePage, VolumeError>;

    /// Room for new volumes with so many devices, on one node or on that where it is largest.
    ///
    /// # Errors
    /// When that can't be told.
    async fn room(&self, node: Option<&str>, vdevs: Vdevs) -> Result<Room, VolumeError>;

    /// The error for an id that nothing here has.
    fn not_found(&self, id: &str) -> VolumeError;
}

/// A page of volumes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VolumePage {
    /// The volumes.
    pub volumes: Vec<Volume>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<String>,
}

/// Makes, deletes, grows and lists volumes of this node.
#[derive(Debug, Clone)]
pub struct Provisioner {
    context: Arc<Context>,
    node: Option<NodeVolumes>,
}

/// A volume that is wanted.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    /// Its name: one name, one volume.
    pub name: String,
    /// How large.
    pub range: CapacityRange,
    /// What the StorageClass says.
    pub parameters: VolumeParameters,
    /// Where it may be, the best first; `None` for anywhere.
    pub nodes: Option<Vec<String>>,
    /// The orchestrator's names for it.
    pub labels: BTreeMap<String, String>,
    /// What a VolumeAttributesClass says.
    pub attributes: VolumeAttributes,
    /// A file system or a block device.
    pub mode: VolumeMode,
    /// What it is made from; nothing for an empty one.
    pub source: Option<Source>,
    /// For the life of one pod: the id it has. That of any other follows from its name.
    pub inline: Option<VolumeId>,
}

impl CreateRequest {
    /// The id of what is made.
    pub fn id(&self) -> VolumeId {
        self.inline.unwrap_or_else(|| VolumeId::from_name(&self.name))
    }
}

/// Room for new volumes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// For all new volumes together.
    pub available: Bytes,
    /// For one.
    pub largest: Bytes,
}

impl Provisioner {
    /// A provisioner of this node.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context, node: None }
    }

    /// With the node's side, which is told what changes in volumes that are published.
    #[must_use]
    pub fn telling(self, node: NodeVolumes) -> Self {
        Self { node: Some(node), ..self }
    }

    /// Clears away what creations have left that were cut short, where nobody but this process makes volumes.
    pub async fn collect(&self) {
        if let Err(error) = collect(&self.context, self).await {
            tracing::warn!("creations that were cut short are left as they are: {error}");
        }
    }

    /// Makes the device of a volume that is recorded and has none yet, from its source where it has one. One that is
    /// there already is the answer too.
    ///
    /// # Errors
    /// When the device can't be had; [`VolumeError::Copying`] while a full copy is being made.
    pub async fn finish(&self, id: VolumeId) -> Result<Volume, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move {
            let source = context.find(id).await?.source;
            let _locks = lock_both(&context, id, source).await?;
            let volume = context.find(id).await?;
            context.check_home(&volume)?;
            match volume.phase {
                Phase::Creating => make(&context, volume).await,
                Phase::Ready => Ok(volume),
                Phase::Deleting => Err(deleting(id)),
            }
        })
        .await
    }

    /// Removes the record of a volume of which nothing was made. Whether there is no such record now.
    ///
    /// # Errors
    /// When its record can't be read.
    pub async fn discard_unmade(&self, id: VolumeId) -> Result<bool, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move {
            let Some(Volume { source, .. }) = context.catalog.get(id).await? else { return Ok(true) };
            let _locks = lock_both(&context, id, source).await?;
            Ok(discard_unmade(&context, id, source).await)
        })
        .await
    }

    /// That the device of a volume is here.
    ///
    /// # Errors
    /// When it is not, or can't be looked for.
    pub async fn find_device(&self, id: VolumeId) -> Result<(), VolumeError> {
        let volume = self.context.find(id).await?;
        self.context.check_home(&volume)?;
        self.context.with_device(&volume, move |backing| backing.device(id).map(drop)).await
    }

    /// Room on this node for volumes with so many devices, and what its volumes may take together.
    ///
    /// # Errors
    /// When the provider can't tell, and for mirrors where there can be none.
    pub async fn capacity(&self, vdevs: Vdevs) -> Result<(Room, Bytes), VolumeError> {
        let capacity = self.context.with_devices(!vdevs.is_single(), |backing| backing.capacity()).await?;
        let usable = |partition| {
            let capacity = DiskLayout::capacity_for(partition).min(DiskLayout::MAX_CAPACITY);
            if capacity < DiskLayout::MIN_CAPACITY { Bytes(0) } else { capacity }
        };
        let largest = usable(capacity.largest.min(capacity.available));
        Ok((Room { available: usable(capacity.available), largest }, capacity.total))
    }
}

#[async_trait]
impl Provision for Provisioner {
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { create(&context, request).await }).await
    }

    async fn delete(&self, id: VolumeId) -> Result<Outcome, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { delete(&context, id).await }).await
    }

    async fn expand(&self, id: VolumeId, range: CapacityRange) -> Result<Volume, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { expand(&context, id, range).await }).await
    }

    async fn modify(&self, id: VolumeId, changes: VolumeAttributes) -> Result<Volume, VolumeError> {
        let (context, node) = (self.context.clone(), self.node.clone());
        to_the_end(async move { modify(&context, node.as_ref(), id, changes).await }).await
    }

    /// What its guest said last, unless its device is missing.
    async fn get(&self, id: VolumeId) -> Result<Volume, VolumeError> {
        let mut volume = self.context.find(id).await?;
        if volume.phase == Phase::Ready
            && volume.node == self.context.node
            && let Err(VolumeError::Backing { source: source @ BackingError::Missing { .. }, .. }) =
                self.context.with_device(&volume, move |backing| backing.device(id)).await
        {
            volume.condition = Some(Condition { abnormal: true, message: source.to_string() });
        }
        Ok(volume)
    }

    async fn list(&self, from: Option<String>, limit: usize) -> Result<VolumePage, VolumeError> {
        let parse = |token: String| token.parse().map_err(|_| VolumeError::Token(token.chars().take(64).collect()));
        let mut page = self.context.catalog.list(from.map(parse).transpose()?, limit).await?;
        page.records.retain(|volume| volume.phase != Phase::Creating);
        Ok(VolumePage { volumes: page.records, next: page.next.map(|id| id.to_string()) })
    }

    async fn room(&self, node: Option<&str>, vdevs: Vdevs) -> Result<Room, VolumeError> {
        if node.is_some_and(|node| node != self.context.node) {
            return Ok(Room::default());
        }
        match self.capacity(vdevs).await {
            // There is none for what can't be had, and none while the disk is not there.
            Err(VolumeError::NoMirrors { .. } | VolumeError::Backing { source: BackingError::Gone { .. }, .. }) => {
                Ok(Room::default())
            }
            capacity => Ok(capacity?.0),
        }
    }

    fn not_found(&self, id: &str) -> VolumeError {
        self.context.not_found(id)
    }
}

async fn create(context: &Arc<Context>, request: CreateRequest) -> Result<Volume, VolumeError> {
    let id = request.id();
    check(request.mode, &request.attributes)?;
    check_vdevs(&request)?;
    check_access(&request.parameters, request.mode, context.allows_zfs_access(), || {
        format!("volume {:?} on node {}", request.name, context.node)
    })?;
    let target = Target::Volume(id);
    match create_now(context, &request).await {
        Err(error) if error.is_under_way() && context.copies.wait(target, COPY_PATIENCE).await => {
            create_now(context, &request).await
        }
        Err(error) if error.is_under_way() => {
            Err(request.source.and_then(|source| clone::under_way(context, id, source)).unwrap_or(error))
        }
        made => made,
    }
}

async fn create_now(context: &Arc<Context>, request: &CreateRequest) -> Result<Volume, VolumeError> {
    let id = request.id();
    if request.nodes.as_ref().is_some_and(|nodes| !nodes.contains(&context.node)) {
        return Err(VolumeError::Topology { key: TOPOLOGY_KEY, node: context.node.clone() });
    }
    let found = context.catalog.get(id).await?;
    if found.is_none() && !request.parameters.vdevs.is_single() {
        // Before anything is recorded.
        context.mirrors()?;
    }
    // One that is being made may come to nothing yet: it is compared when whoever makes it has let go of the lock.
    if let Some(volume) = found.filter(|volume| volume.phase != Phase::Creating) {
        return check_same(context, volume, request);
    }
    let _locks = lock_both(context, id, request.source).await?;
    let volume = record(context, request).await?;
    if volume.phase == Phase::Ready {
        return Ok(volume);
    }
    crash::point("create: recorded");
    let source = volume.source;
    let made = make(context, volume).await;
    if made.as_ref().is_err_and(|error| !error.is_under_way()) {
        discard_unmade(context, id, source).await;
    }
    made
}

/// Removes the record of a volume of which nothing was made: its name is free again, for another class and on other
/// nodes. Under its lock, so that nobody is about to make it. Says whether there is no such record now.
async fn discard_unmade(context: &Context, id: VolumeId, source: Option<Source>) -> bool {
    let discarded = async {
        let Some(volume) = context.catalog.get(id).await? else { return Ok(true) };
        let begun = volume.phase != Phase::Creating || context.copies.is_known(Target::Volume(id));
        if begun || !context.is_unmade(&volume).await? {
            return Ok(false);
        }
        if let Some(source) = source {
            clone::unmark_source(context, source, id).await;
        }
        context.catalog.remove(id).await?;
        Ok::<_, VolumeError>(true)
    };
    discarded.await.unwrap_or_else(|error| {
        tracing::warn!(volume = %id, "the record of a volume that was not made stays until it is asked for again: {error}");
        false
    })
}

/// What creations have left that were cut short: records of which there is nothing go, and a device that is whole becomes
/// the volume it was to be, so that it is listed and can be deleted.
async fn collect(context: &Arc<Context>, provisioner: &Provisioner) -> Result<(), VolumeError> {
    let mut from = None;
    loop {
        let page = context.catalog.list(from, SCAN).await?;
        for Volume { id, source, .. } in page.records.into_iter().filter(|v| v.phase == Phase::Creating && !v.ephemeral)
        {
            let gone = {
                let _locks = lock_both(context, id, source).await?;
                discard_unmade(context, id, source).await
            };
            let finished = if gone { Ok(()) } else { provisioner.finish(id).await.map(drop) };
            match finished {
                Ok(()) => tracing::info!(volume = %id, gone, "a creation that was cut short is over"),
                Err(error) => tracing::warn!(volume = %id, "a creation that was cut short is left as it is: {error}"),
            }
        }
        match page.next {
            Some(next) => from = Some(next),
            None => return Ok(()),
        }
    }
}

/// The record of a volume that is wanted, as it was found or as it is now made.
async fn record(context: &Context, request: &CreateRequest) -> Result<Volume, VolumeError> {
    if let Some(volume) = context.catalog.get(request.id()).await? {
        let (id, source, phase) = (volume.id, volume.source, volume.phase);
        match check_same(context, volume, request) {
            Err(VolumeError::Exists { .. })
                if phase == Phase::Creating && discard_unmade(context, id, source).await => {}
            same => return same,
        }
    }
    let capacity = match request.source {
        None => request.range.choose(request.mode)?,
        Some(source) => {
            let bounds = clone::bounds(context, source).await?;
            if bounds.node != context.node {
                let (name, source_name) = (request.name.clone(), source.to_string());
                return Err(VolumeError::SourceElsewhere { name, source_name, home: bounds.node });
            }
            bounds.choose(request, source)?
        }
    };
    crash::point("create: begin");
    let wanted = Volume {
        id: request.id(),
        labels: request.labels.clone(),
        attributes: request.attributes.clone(),
        mode: request.mode,
        source: request.source,
        ephemeral: request.inline.is_some(),
        ..Volume::wanted(&request.name, capacity, request.parameters.clone(), &context.node)
    };
    match context.catalog.create(wanted).await? {
        Created::Created(volume) => Ok(volume),
        Created::Existed(volume) => check_same(context, volume, request),
    }
}

/// The locks of a volume and of that which keeps its source as it is.
async fn lock_both(context: &Context, id: VolumeId, source: Option<Source>) -> Result<Vec<VolumeLock>, VolumeError> {
    let keeper = match source {
        Some(source) => clone::keeper(context, source).await?,
        None => None,
    };
    Ok(context.lock_all([id].into_iter().chain(keeper)).await)
}

/// Makes the device of a recorded volume. Under its lock, and that of its source.
async fn make(context: &Arc<Context>, volume: Volume) -> Result<Volume, VolumeError> {
    let largest = context.with_device(&volume, |backing| backing.largest_disk()).await?;
    let volume = volume.within(largest);
    if let Some(limit) = volume.disk_limit {
        let (id, headroom) = (volume.id, volume.parameters.headroom);
        tracing::info!(volume = %id, %headroom, disk = %limit, "the file system holds no larger disk: less headroom than \
            was asked for");
    }
    let (volume, made) = match volume.source {
        Some(source) => (clone::fill(context, volume, source).await?, Outcome::Unchanged),
        None => {
            let spec = device_spec(&volume);
            let made = context.with_device(&volume, move |backing| backing.create(&spec)).await?;
            crash::point("create: device made");
            (volume, made)
        }
    };
    let table_capacity = volume.capacity;
    let ready = Volume { phase: Phase::Ready, table_capacity, ..volume.clone() };
    let volume = match context.catalog.update(ready).await {
        // Given up while its device was made, which nobody can have used.
        Err(gone @ CatalogError::NotFound(_)) if made == Outcome::Changed && !volume.is_mirrored() => {
            let id = volume.id;
            context.with_device(&volume, move |backing| backing.destroy(id)).await?;
            return Err(gone.into());
        }
        recorded => recorded?,
    };
    crash::point("create: done");
    tracing::debug!(volume = %volume.id, name = volume.name, capacity = %volume.capacity, "volume made");
    Ok(volume)
}

fn check_same(context: &Context, volume: Volume, request: &CreateRequest) -> Result<Volume, VolumeError> {
    let volume = same(volume, request)?;
    context.check_home(&volume)?;
    Ok(volume)
}

/// Whether what exists under a name is what was asked for.
pub(crate) fn same(volume: Volume, request: &CreateRequest) -> Result<Volume, VolumeError> {
    let difference = if volume.name != request.name {
        format!("its name is {:?}", volume.name)
    } else if !request.range.accepts(volume.capacity) {
        format!("it holds {}", volume.capacity)
    } else if volume.parameters != request.parameters {
        "it was made with other parameters".to_owned()
    } else if volume.mode != request.mode {
        "it was made for another volumeMode".to_owned()
    } else if volume.ephemeral != request.inline.is_some() {
        "one of them is for the life of one pod only".to_owned()
    } else if volume.source != request.source {
        volume.source.map_or_else(|| "it was made empty".to_owned(), |source| format!("it was made from {source}"))
    } else {
        return if volume.phase == Phase::Deleting { Err(deleting(volume.id)) } else { Ok(volume) };
    };
    Err(VolumeError::Exists { name: request.name.clone(), id: volume.id, difference })
}

async fn delete(context: &Context, id: VolumeId) -> Result<Outcome, VolumeError> {
    let _lock = context.lock(id).await;
    let Some(volume) = context.catalog.get(id).await? else { return Ok(Outcome::Unchanged) };
    context.check_home(&volume)?;
    if let Some(publication) = context.publication(&volume) {
        return Err(context.published_error(id, publication));
    }
    context.check_not_read(CopySource::Device(id))?;
    // One that is being filled is given up.
    context.copies.stop(Target::Volume(id)).await;
    crash::point("delete: begin");
    let unmade = volume.is_mirrored() && volume.phase == Phase::Creating && context.mirrors.is_err();
    if unmade && !clone::has_device(context, id).await? {
        // It was never made here, and can't be looked for.
        context.catalog.remove(id).await?;
        return Ok(Outcome::Changed);
    }
    context.part(&volume, Removal::Now).await?;
    if volume.phase != Phase::Deleting {
        if volume.phase == Phase::Ready {
            // Not condemned while a virtual machine still has it. A device that is gone keeps nobody from deleting.
            match context.with_device(&volume, move |backing| backing.exclusive(id).map(drop)).await {
                Err(VolumeError::Backing { source: BackingError::Missing { .. }, .. }) => {}
                proof => proof?,
            }
        }
        context.catalog.update(Volume { phase: Phase::Deleting, publication: None, ..volume.clone() }).await?;
    }
    crash::point("delete: recorded");
    if let Some(source) = volume.source.filter(|_| volume.phase == Phase::Creating) {
        clone::unmark_source(context, source, id).await;
    }
    context.with_device(&volume, move |backing| backing.destroy(id)).await?;
    crash::point("delete: device destroyed");
    context.catalog.remove(id).await?;
    crash::point("delete: done");
    tracing::debug!(volume = %id, "volume deleted");
    Ok(Outcome::Changed)
}

async fn expand(context: &Context, id: VolumeId, range: CapacityRange) -> Result<Volume, VolumeError> {
    let _lock = context.lock(id).await;
    let volume = context.ready(id).await?;
    let wanted = range.required.unwrap_or(volume.capacity);
    if wanted <= volume.capacity {
        if range.limit.is_some_and(|limit| limit < volume.capacity) {
            let reason = format!("volume {id} holds {} already, and volumes never shrink", volume.capacity);
            return Err(VolumeError::OutOfRange { reason });
        }
        return Ok(volume);
    }
    let wanted = CapacityRange { required: Some(wanted), ..range }.choose(volume.mode)?;
    let grown = Volume { capacity: wanted, ..volume };
    let spec = device_spec(&grown);
    crash::point("expand: begin");
    // The room first, the record after it: what is recorded is always backed. Killed in between, the volume keeps its
    // size and a little too much is promised to it, until the call is repeated.
    context.with_device(&grown, move |backing| backing.grow(&spec)).await?;
    crash::point("expand: room promised");
    let grown = context.catalog.update(grown).await?;
    context.published.refresh(&grown);
    crash::point("expand: recorded");
    tracing::info!(volume = %id, capacity = %grown.capacity, "volume expanded");
    Ok(grown)
}
