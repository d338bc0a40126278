use std::fmt;

use k8s_openapi::ClusterResourceScope;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::Resource;
use kube::core::object::{HasSpec, HasStatus};
use serde::Serialize;
use serde::de::DeserializeOwned;
use zpod_storage::catalog::{CatalogError, Record};

use crate::record::READY;

/// A kind of object in which records are kept: the controller's wish in `spec`, the node's record in `status`.
pub trait Kept:
    Resource<DynamicType = (), Scope = ClusterResourceScope>
    + HasSpec<Spec: Clone + PartialEq + Serialize + Send + Sync>
    + HasStatus<Status: Clone + Default + PartialEq + Serialize + Send + Sync>
    + Clone
    + fmt::Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// What is recorded in it.
    type Record: Record;
    /// How far it has come, as its node says.
    type Phase: Copy + Send + Sync;
    /// What requests are called in errors.
    const REQUESTS: Requests;

    /// The object that asks for a new record.
    fn asking_for(record: &Self::Record) -> Self;

    /// The record in it.
    ///
    /// # Errors
    /// When it is none that zpod wrote.
    fn record(&self) -> Result<Self::Record, CatalogError>;

    /// The node's part of the status for a record that is to replace the one in it.
    fn status_for(&self, record: &Self::Record) -> Self::Status;

    /// The part of the status that the node owns.
    fn own_status(&self) -> Self::Status;

    /// The object to make once this one, which somebody has deleted by hand, is gone: it carries what the node has recorded.
    /// None where nothing was made, or what was made can't be kept: a snapshot that is not finished, what is being destroyed.
    ///
    /// # Errors
    /// When the record is none that zpod wrote.
    fn anew(&self) -> Result<Option<Self>, CatalogError>;

    /// Whether it was made anew with what its node had recorded.
    fn is_made_anew(&self) -> bool;

    /// Whether it was, and its node has not found yet what it stands for.
    fn is_to_be_adopted(&self) -> bool {
        let mut status = self.status().cloned().unwrap_or_default();
        let head = Self::head(&mut status);
        let found = head.conditions.iter().any(|condition| condition.type_ == READY && condition.status == "True");
        self.is_made_anew() && !found
    }

    /// Whether its node has not said that there is anything of it.
    fn is_unmade(&self) -> bool;

    /// The node that it is on.
    fn node(&self) -> &str;

    /// What every status has.
    fn head(status: &mut Self::Status) -> Head<'_, Self::Phase>;

    /// Whether its end is asked for together with that of what it stands for.
    fn destroy(spec: &mut Self::Spec) -> &mut bool;

    /// Whether it is.
    fn is_to_be_destroyed(&self) -> bool {
        *Self::destroy(&mut self.spec().clone())
    }

    /// Takes over from `found` what others own and the node's record only carries.
    fn taking_over(record: Self::Record, found: &Self::Record) -> Self::Record;
}

/// What every status has.
#[derive(Debug)]
pub struct Head<'a, P> {
    /// How far it has come.
    pub phase: &'a mut Option<P>,
    /// The generation of the spec that it speaks of.
    pub observed_generation: &'a mut Option<i64>,
    /// What is to be said of it.
    pub conditions: &'a mut Vec<Condition>,
}

/// What requests for one kind are called in errors.
#[derive(Debug, Clone, Copy)]
pub struct Requests {
    pub(crate) get: &'static str,
    pub(crate) list: &'static str,
    pub(crate) create: &'static str,
    pub(crate) change: &'static str,
    pub(crate) status: &'static str,
    pub(crate) release: &'static str,
    pub(crate) delete: &'static str,
}
