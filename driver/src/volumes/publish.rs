use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;
use zpod_storage::backing::{BackingError, Exclusive, Outcome};
use zpod_storage::catalog::{ClaimRef, PodRef, Publication, RollbackRecord, Volume};
use zpod_storage::crash;
use zpod_volume::{MountFlag, TokenDigest, VolumeId, VolumeMode, VolumeSpec};

use super::access::check_access;
use super::block::check_mode;
use super::context::{blocking, device_spec, to_the_end};
use super::inline::{InlineLimits, InlineVolumes};
use super::keys::{self, KeyPair, Keys};
use super::observer::Observer;
use super::pods::{AnyPod, PodCheck};
use super::rollback::{for_publication, now};
use super::spec::{discard, volume_spec};
use super::withdraw::Place;
use super::{Context, VolumeError, mount_options};
use crate::kata::{DirectVolume, DirectVolumes, TargetPath};

/// How long a virtual machine that is on its way out is waited for.
const CLOSING: Duration = Duration::from_millis(2500);
const CLOSING_STEP: Duration = Duration::from_millis(100);
/// Records are read this many at a time at start.
const LOAD_PAGE: usize = 256;

/// Publishes the volumes of this node to pods, and listens to their guests.
#[derive(Debug, Clone)]
pub struct NodeVolumes {
    pub(super) context: Arc<Context>,
    pub(super) direct: Arc<DirectVolumes>,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) pods: Arc<dyn PodCheck>,
    pub(super) keys: Arc<Keys>,
    /// The volumes that pods have inline, and their bounds.
    pub(super) inline: Arc<InlineVolumes>,
}

/// A publication that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublishRequest {
    /// The volume.
    pub id: VolumeId,
    /// Where the pod's mount is to appear.
    pub target: PathBuf,
    /// A directory, or a block device.
    pub mode: VolumeMode,
    /// Read-only.
    pub read_only: bool,
    /// The group that owns the volume.
    pub fs_group: Option<u32>,
    /// Mount flags.
    pub flags: Vec<MountFlag>,
    /// The pod, where the orchestrator told.
    pub pod: Option<PodRef>,
    /// The volume's key, where it is encrypted.
    pub keys: Option<KeyPair>,
}

impl PublishRequest {
    /// A writable publication without options.
    pub fn new(id: VolumeId, target: &Path) -> Self {
        Self {
            id,
            target: target.to_owned(),
            mode: VolumeMode::Filesystem,
            read_only: false,
            fs_group: None,
            flags: Vec::new(),
            pod: None,
            keys: None,
        }
    }
}

impl NodeVolumes {
    /// Takes up where an earlier process left off: the publications of this boot of the host stand.
    ///
    /// # Errors
    /// When the catalog can't be read.
    pub async fn load(context: Arc<Context>, direct: DirectVolumes) -> Result<Self, VolumeError> {
        let (observer, pods) = (Arc::new(Vec::new()), Arc::new(AnyPod));
        let (direct, keys, inline) = (Arc::new(direct), Arc::default(), Arc::default());
        let node = Self { context, direct, observer, pods, keys, inline };
        let mut from = None;
        loop {
            let page = node.context.catalog.list(from, LOAD_PAGE).await?;
            for volume in &page.records {
                if let Err(error) = node.forget_token_in_record(volume).await {
                    tracing::warn!(volume = %volume.id, "its record still has the token of its publication: {error}");
                }
                node.take_up(volume).await;
            }
            match page.next {
                Some(next) => from = Some(next),
                None => return Ok(node),
            }
        }
    }

    /// Takes up what is recorded of a volume that this process does not know yet. Under its lock, or before anybody calls.
    async fn take_up(&self, volume: &Volume) {
        if volume.ephemeral {
            self.inline.found(volume);
        }
        let Some(publication) = self.context.publication(volume) else { return };
        self.context.published.take_up(volume, publication);
        // An entry that lets a guest make a pool must not outlive the record that forbids it.
        if let Err(error) = self.refresh_entry(volume).await {
            tracing::warn!(volume = %volume.id, "direct volume not refreshed: {error}");
        }
    }

    /// Takes up a volume whose record was made anew. It may have been unpublished, or this process started, while there was
    /// none.
    ///
    /// # Errors
    /// When its record can't be read.
    pub async fn adopted(&self, id: VolumeId) -> Result<(), VolumeError> {
        {
            let _lock = self.context.lock(id).await;
            let volume = self.context.find(id).await?;
            if self.context.published.observed(id).is_none() {
                self.take_up(&volume).await;
            }
        }
        self.withdraw_where(|other| other == id).await;
        Ok(())
    }

    /// With somebody to tell what guests say.
    #[must_use]
    pub fn observed_by(self, observer: Arc<dyn Observer>) -> Self {
        Self { observer, ..self }
    }

    /// With somebody to ask whether a pod can use a volume.
    #[must_use]
    pub fn checking_pods(self, pods: Arc<dyn PodCheck>) -> Self {
        Self { pods, ..self }
    }

    /// With ephemeral volumes, up to these bounds. Without, there are none. Before it is used by anybody.
    #[must_use]
    pub fn with_ephemeral(mut self, limits: InlineLimits) -> Self {
        match Arc::get_mut(&mut self.inline) {
            Some(inline) => inline.limits = limits,
            None => tracing::error!("bounds of inline volumes came too late"),
        }
        self
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.context.node
    }

    /// What it works on.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Whether a volume can be used here: there is nothing to attach for files, so this looks and changes nothing.
    ///
    /// # Errors
    /// When the volume does not exist here, or its device is missing.
    pub async fn stage(&self, id: VolumeId) -> Result<(), VolumeError> {
        let volume = self.context.ready(id).await?;
        self.context.with_device(&volume, move |backing| backing.device(id)).await.map(|_| ())
    }

    /// Publishes a volume to one pod. Repeated as long as the pod lives (CSIDriver `requiresRepublish`): that brings the
    /// key as it is now, and costs no question to the catalog.
    ///
    /// # Errors
    /// While it is published to another, or a virtual machine still has its device.
    pub async fn publish(&self, request: PublishRequest) -> Result<Outcome, VolumeError> {
        let node = self.clone();
        to_the_end(async move {
            let (id, target) = (request.id, request.target.clone());
            let outcome = match node.publish_now(request).await {
                Ok(outcome) => outcome,
                Err(error) => return Err(node.failed_to_publish(id, &target, error).await),
            };
            // The lock is given back: a guest may take its time.
            node.change_key_in_guest(id).await?;
            Ok(outcome)
        })
        .await
    }

    /// Takes a publication back. Nothing is done to the device, unless it is that of an ephemeral volume, which ends so.
    /// What is not published is no error.
    ///
    /// # Errors
    /// When the target path can't be cleared, such as for files in its directory; when a virtual machine still has an
    /// ephemeral volume.
    pub async fn unpublish(&self, id: VolumeId, target: PathBuf) -> Result<Outcome, VolumeError> {
        let node = self.clone();
        to_the_end(async move {
            let (outcome, ends) = node.unpublish_now(id, &target).await?;
            // The lock is given back.
            if ends { node.end_ephemeral(id).await } else { Ok(outcome) }
        })
        .await
    }

    async fn publish_now(&self, request: PublishRequest) -> Result<Outcome, VolumeError> {
        let _lock = self.context.lock(request.id).await;
        let given = request.target.clone();
        let target = blocking(move || Ok(TargetPath::resolve(&given)?)).await?;
        if self.stands(&request, &target).await? {
            return Ok(Outcome::Unchanged);
        }
        let volume = self.context.ready(request.id).await?;
        check_mode(&volume, request.mode)?;
        check_keys(volume.id, volume.parameters.encryption.is_some(), request.keys.as_ref())?;
        let Some(publication) = self.context.publication(&volume) else {
            return self.publish_anew(volume, &target, request).await;
        };
        match self.place(publication, &target).await? {
            Place::Same => {}
            Place::SameByAnotherName => {
                let (id, target) = (volume.id, publication.target_path.clone());
                let difference = "target_path is another name of the same directory";
                return Err(VolumeError::PublishedOtherwise { id, target, difference });
            }
            Place::Other => return Err(self.context.published_error(volume.id, publication)),
        }
        if let Some(difference) = difference(publication, &request) {
            return Err(VolumeError::PublishedOtherwise { id: volume.id, target: request.target, difference });
        }
        self.take_keys(&request)?;
        let id = volume.id;
        let installed = self.install_again(volume, &target).await;
        installed.map_err(|source| self.still_published(id, source))
    }

    /// Whether everything that the request asks for is there already. It then brings its key, and nothing else.
    async fn stands(&self, request: &PublishRequest, target: &TargetPath) -> Result<bool, VolumeError> {
        let known = self.context.published.observed(request.id);
        let here = known.filter(|(volume, _)| volume.target == target.as_path() && request.mode.is_filesystem());
        let Some((_, digest)) = here.filter(|_| !self.context.published.is_stale(request.id)) else {
            return Ok(false);
        };
        let (direct, target) = (self.direct.clone(), target.clone());
        let there = blocking(move || Ok(if target.has_placeholder()? { direct.spec(&target)? } else { None })).await?;
        let same = |spec: &VolumeSpec| {
            digest.is_of(spec.token)
                && spec.read_only == request.read_only
                && spec.fs_group == request.fs_group
                && spec.mount_flags == request.flags
        };
        let Some(spec) = there.filter(same) else { return Ok(false) };
        check_keys(request.id, spec.encryption.is_some(), request.keys.as_ref())?;
        self.take_keys(request)?;
        Ok(true)
    }

    fn take_keys(&self, request: &PublishRequest) -> Result<(), VolumeError> {
        request.keys.clone().map_or(Ok(()), |pair| self.keys.offer(request.id, pair))
    }

    async fn publish_anew(
        &self,
        volume: Volume,
        target: &TargetPath,
        request: PublishRequest,
    ) -> Result<Outcome, VolumeError> {
        let id = volume.id;
        check_access(&volume.parameters, volume.mode, self.context.allows_zfs_access(), || {
            format!("volume {id} on node {}", self.context.node)
        })?;
        // Once: what it depends on does not change in the life of a pod, and kubelet repeats its calls when it restarts.
        let claim = self.pods.check(request.pod.as_ref(), &volume, &request.target).await?;
        // What was left of an earlier publication belongs to it.
        self.keys.forget(id);
        self.take_keys(&request)?;
        self.reserve(id, target, &request).await.inspect_err(|_| self.keys.forget(id))?;
        let (volume, publication, token) = match self.record_publication(volume, target, request, claim).await {
            Ok(published) => published,
            Err(error) => return Err(self.not_recorded(id, target, error).await),
        };
        crash::point("publish: recorded");
        match self.install(&volume, &publication, token, target).await {
            Err(error) => Err(self.not_installed(volume, target, error).await),
            installed => installed,
        }
    }

    /// Takes the target path for a volume: there is one at a place, whatever the names it is given by.
    async fn reserve(&self, id: VolumeId, target: &TargetPath, request: &PublishRequest) -> Result<(), VolumeError> {
        let taken = |by| VolumeError::TargetTaken { target: request.target.clone(), by };
        self.context.published.reserve(id, target.as_path()).map_err(taken)?;
        // Behind the reservation, so that of two that come at once one sees the other.
        let other = self.other_at(id, target.as_path()).await;
        if !matches!(other, Ok(None)) {
            self.context.published.remove(id);
        }
        other?.map_or(Ok(()), |by| Err(taken(by)))
    }

    /// Everything that needs the proof that no kernel has the pool, and the record of the publication.
    async fn record_publication(
        &self,
        volume: Volume,
        target: &TargetPath,
        request: PublishRequest,
        claim: Option<ClaimRef>,
    ) -> Result<(Volume, Publication, Uuid), VolumeError> {
        crash::point("publish: begin");
        let volume = self.prepare_halves(volume).await?;
        let proof = self.prove_exclusive(&volume).await?;
        let (spec, written) = (device_spec(&volume), volume.written);
        let write_table = volume.table_capacity != volume.capacity;
        let prepare = move |backing: &dyn zpod_storage::backing::Backing| {
            let written = written || backing.ever_written(&spec)?;
            if write_table {
                crash::point("publish: table");
                backing.write_table(&spec, proof.as_ref())?;
                crash::point("publish: table written");
            }
            Ok((written, proof))
        };
        let (written, proof) = self.context.with_device(&volume, prepare).await?;
        let token = Uuid::new_v4();
        let pending = volume.pending_rollback().is_some();
        let (given, rollback) =
            for_publication(volume.rollback.clone(), request.pod.as_ref(), request.read_only, now());
        let publication = Publication {
            target_path: target.as_path().to_owned(),
            token_digest: TokenDigest::of(token),
            read_only: request.read_only,
            fs_group: request.fs_group,
            mount_flags: mount_options::names(&request.flags),
            rollback: given,
            pod: request.pod,
            claim,
            boot_id: self.context.boot_id.clone(),
        };
        let table_capacity = volume.capacity;
        let record = Volume { written, table_capacity, publication: Some(publication.clone()), rollback, ..volume };
        let proof = match record.mode {
            VolumeMode::Block => self.leave_note(&record, &publication, token, proof).await?,
            VolumeMode::Filesystem => proof,
        };
        let volume = self.context.catalog.update(record).await?;
        self.context.published.insert(&volume, &publication);
        self.context.published.keep_token(volume.id, token);
        if pending && let Some(RollbackRecord { request, outcome: Some(outcome), .. }) = &volume.rollback {
            self.tell_rolled_back(volume.id, request, outcome);
        }
        // Held until the record keeps others out; let go before the shim may open the device.
        drop(proof);
        Ok((volume, publication, token))
    }

    /// What is published already, with the token that it has: it is in the memory of this process, or in Kata's entry.
    async fn install_again(&self, volume: Volume, target: &TargetPath) -> Result<Outcome, VolumeError> {
        let id = volume.id;
        let Some(publication) = volume.publication.clone() else { return Ok(Outcome::Unchanged) };
        if volume.mode == VolumeMode::Block {
            return self.install_device(&volume, target).await;
        }
        let token = match self.context.published.token(id) {
            Some(token) => Some(token),
            None => {
                let (direct, target) = (self.direct.clone(), target.clone());
                let spec = blocking(move || Ok(direct.spec(&target)?)).await?;
                spec.map(|spec| spec.token).filter(|token| publication.token_digest.is_of(*token))
            }
        };
        if let Some(token) = token {
            return self.install(&volume, &publication, token, target).await;
        }
        // Killed between the record and the entry. Nobody was told the token, if nobody has the device: there is a new one.
        let proof = self.prove_exclusive(&volume).await?;
        let token = Uuid::new_v4();
        let publication = Publication { token_digest: TokenDigest::of(token), ..publication };
        let record = Volume { publication: Some(publication.clone()), ..volume };
        let volume = self.context.catalog.update(record).await?;
        self.context.published.insert(&volume, &publication);
        self.context.published.keep_token(id, token);
        drop(proof);
        self.install(&volume, &publication, token, target).await
    }

    /// The placeholder and the entry, whatever is there of them already.
    async fn install(
        &self,
        volume: &Volume,
        publication: &Publication,
        token: Uuid,
        target: &TargetPath,
    ) -> Result<Outcome, VolumeError> {
        if volume.mode == VolumeMode::Block {
            return self.install_device(volume, target).await;
        }
        let joined = self.join_halves(volume).await?;
        let device = self.context.device_of(volume).await?;
        let entry = DirectVolume { device, spec: volume_spec(volume, publication, token), discard: discard(volume) };
        let (direct, target) = (self.direct.clone(), target.clone());
        let installed = blocking(move || {
            // The placeholder first: at no moment is there a path that Kata could share from the host's disk.
            let mounted = target.mount_placeholder()?;
            crash::point("publish: placeholder mounted");
            let written = direct.publish(&target, &entry)?;
            crash::point("publish: direct volume written");
            let all = [joined, mounted, written];
            Ok(if all.contains(&Outcome::Changed) { Outcome::Changed } else { Outcome::Unchanged })
        })
        .await?;
        self.context.published.set_stale(volume.id, false);
        Ok(installed)
    }

    /// Writes the entry of a published volume again, if there is one, from the record as it is now. Where that fails, its
    /// guest's next report and the next NodePublishVolume try again.
    pub(super) async fn refresh_entry(&self, volume: &Volume) -> Result<(), VolumeError> {
        self.context.published.set_stale(volume.id, true);
        self.write_entry(volume).await?;
        self.context.published.set_stale(volume.id, false);
        Ok(())
    }

    async fn write_entry(&self, volume: &Volume) -> Result<(), VolumeError> {
        let Some(publication) = self.context.publication(volume).cloned() else { return Ok(()) };
        if volume.mode == VolumeMode::Block {
            // There is none, and its note is written while nobody has the device.
            return Ok(());
        }
        let device = self.context.device_of(volume).await?;
        let (id, direct, volume) = (volume.id, self.direct.clone(), volume.clone());
        let token = blocking(move || {
            let target = TargetPath::resolve(&publication.target_path)?;
            let token = direct.spec(&target)?.map(|spec| spec.token);
            let Some(token) = token.filter(|token| publication.token_digest.is_of(*token)) else { return Ok(None) };
            let spec = volume_spec(&volume, &publication, token);
            direct.publish(&target, &DirectVolume { device, spec, discard: discard(&volume) })?;
            Ok(Some(token))
        })
        .await?;
        if let Some(token) = token {
            self.context.published.keep_token(id, token);
        }
        Ok(())
    }

    /// Writes a record again that an earlier version wrote with the token itself, which others could read.
    async fn forget_token_in_record(&self, volume: &Volume) -> Result<(), VolumeError> {
        if volume.publication.as_ref().is_some_and(|publication| publication.token_digest.was_plain()) {
            self.context.catalog.update(volume.clone()).await?;
        }
        Ok(())
    }

    /// Proves that no virtual machine has the device; one that is on its way out is given a moment.
    pub(super) async fn prove_exclusive(&self, volume: &Volume) -> Result<Box<dyn Exclusive>, VolumeError> {
        let (id, closing) = (volume.id, Closing::begin());
        loop {
            let answer = self.context.with_device(volume, move |backing| backing.exclusive(id)).await;
            if let Some(answer) = closing.over(answer).await {
                return answer;
            }
        }
    }
}

/// Patience with a virtual machine, or a device, that is on its way out.
#[derive(Debug)]
pub(super) struct Closing(Instant);

impl Closing {
    pub(super) fn begin() -> Self {
        Self(Instant::now())
    }

    /// An answer that is final; `None`, after a moment, where it is worth while to try again.
    pub(super) async fn over<T>(&self, answer: Result<T, VolumeError>) -> Option<Result<T, VolumeError>> {
        match answer {
            Err(VolumeError::Backing { source: BackingError::InUse { .. }, .. }) if self.0.elapsed() < CLOSING => {
                tokio::time::sleep(CLOSING_STEP).await;
                None
            }
            answer => Some(answer),
        }
    }
}

/// Whether the keys that came are those that the volume needs.
fn check_keys(id: VolumeId, encrypted: bool, given: Option<&KeyPair>) -> Result<(), VolumeError> {
    match (encrypted, given) {
        (true, None) => Err(keys::missing(id)),
        (false, Some(_)) => Err(keys::not_encrypted(id)),
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

/// What differs between a publication and a request for the same path.
fn difference(publication: &Publication, request: &PublishRequest) -> Option<&'static str> {
    if publication.read_only != request.read_only {
        Some("readonly")
    } else if publication.fs_group != request.fs_group {
        Some("volume_mount_group")
    } else if publication.mount_flags != mount_options::names(&request.flags) {
        Some("mount_flags")
    } else {
        None
    }
}
