use std::fmt;
use std::str::FromStr;

use uuid::Uuid;
use zpod_volume::VolumeId;

use crate::{AUDIENCE, NewSnapshotName, ParseTokenError, ResumeToken, SendName, SnapshotName};

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// `GET /v1/doctor`: what is right and wrong on the node, a list of [`crate::Check`].
    Doctor,
    /// `GET /v1/volumes/<id>/properties`: [`crate::Properties`].
    Properties(VolumeId),
    /// `GET /v1/volumes/<id>/send-points`: [`crate::SendPoints`].
    SendPoints(VolumeId),
    /// `POST /v1/volumes/<id>/remove-send-point?snapshot=NAME` ([`snapshot`]): answers [`crate::Removed`].
    RemoveSendPoint(VolumeId),
    /// `GET /v1/volumes/<id>/snapshots`: [`crate::PoolSnapshots`].
    Snapshots(VolumeId),
    /// `POST /v1/volumes/<id>/take-snapshot?snapshot=NAME` ([`new_snapshot_name`]): answers [`crate::Taken`].
    TakeSnapshot(VolumeId),
    /// `POST /v1/volumes/<id>/destroy-snapshot?snapshot=NAME` ([`snapshot_name`]): answers [`crate::Removed`].
    DestroySnapshot(VolumeId),
    /// `GET /v1/volumes/<id>/rollback-plan?...` ([`RollbackQuery`]): [`crate::RollbackPlan`].
    RollbackPlan(VolumeId),
    /// `POST /v1/volumes/<id>/rollback?...` ([`RollbackQuery`]): answers [`crate::RollbackRequested`].
    Rollback(VolumeId),
    /// `POST /v1/volumes/<id>/cancel-rollback`: answers [`crate::RollbackRequested`], what was taken back.
    CancelRollback(VolumeId),
    /// `GET /v1/volumes/<id>/send?...`: a ZFS stream ([`SendQuery`]).
    Send(VolumeId),
    /// `POST /v1/volumes/<id>/receive`: reads one, and answers [`crate::Received`].
    Receive(VolumeId),
}

impl Route {
    /// Reads a path. Ids are taken in one form only, so that no two paths mean the same.
    pub fn parse(path: &str) -> Option<Self> {
        let rest = path.strip_prefix("/v1/")?;
        if rest == "doctor" {
            return Some(Self::Doctor);
        }
        let (id, what) = rest.strip_prefix("volumes/")?.split_once('/')?;
        let id = id.parse().ok()?;
        match what {
            "properties" => Some(Self::Properties(id)),
            "send-points" => Some(Self::SendPoints(id)),
            "remove-send-point" => Some(Self::RemoveSendPoint(id)),
            "snapshots" => Some(Self::Snapshots(id)),
            "take-snapshot" => Some(Self::TakeSnapshot(id)),
            "destroy-snapshot" => Some(Self::DestroySnapshot(id)),
            "rollback-plan" => Some(Self::RollbackPlan(id)),
            "rollback" => Some(Self::Rollback(id)),
            "cancel-rollback" => Some(Self::CancelRollback(id)),
            "send" => Some(Self::Send(id)),
            "receive" => Some(Self::Receive(id)),
            _ => None,
        }
    }

    /// The audience of the token that opens this on a node, and nothing else: no other call, volume or node. So whoever
    /// is shown a token can do no more with it than it was asked to do.
    pub fn audience(self, node: &str) -> String {
        let (what, id) = match self {
            Self::Doctor => return format!("{AUDIENCE}/{node}/doctor"),
            Self::Properties(id) => ("properties", id),
            Self::SendPoints(id) => ("send-points", id),
            Self::RemoveSendPoint(id) => ("remove-send-point", id),
            Self::Snapshots(id) => ("snapshots", id),
            Self::TakeSnapshot(id) => ("take-snapshot", id),
            Self::DestroySnapshot(id) => ("destroy-snapshot", id),
            Self::RollbackPlan(id) => ("rollback-plan", id),
            Self::Rollback(id) => ("rollback", id),
            Self::CancelRollback(id) => ("cancel-rollback", id),
            Self::Send(id) => ("send", id),
            Self::Receive(id) => ("receive", id),
        };
        format!("{AUDIENCE}/{node}/{what}/{id}")
    }

    /// The method it is asked with.
    pub fn method(self) -> &'static str {
        match self {
            Self::Receive(_)
            | Self::RemoveSendPoint(_)
            | Self::TakeSnapshot(_)
            | Self::DestroySnapshot(_)
            | Self::Rollback(_)
            | Self::CancelRollback(_) => "POST",
            Self::Doctor
            | Self::Properties(_)
            | Self::SendPoints(_)
            | Self::Snapshots(_)
            | Self::RollbackPlan(_)
            | Self::Send(_) => "GET",
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Doctor => f.write_str("/v1/doctor"),
            Self::Properties(id) => write!(f, "/v1/volumes/{id}/properties"),
            Self::SendPoints(id) => write!(f, "/v1/volumes/{id}/send-points"),
            Self::RemoveSendPoint(id) => write!(f, "/v1/volumes/{id}/remove-send-point"),
            Self::Snapshots(id) => write!(f, "/v1/volumes/{id}/snapshots"),
            Self::TakeSnapshot(id) => write!(f, "/v1/volumes/{id}/take-snapshot"),
            Self::DestroySnapshot(id) => write!(f, "/v1/volumes/{id}/destroy-snapshot"),
            Self::RollbackPlan(id) => write!(f, "/v1/volumes/{id}/rollback-plan"),
            Self::Rollback(id) => write!(f, "/v1/volumes/{id}/rollback"),
            Self::CancelRollback(id) => write!(f, "/v1/volumes/{id}/cancel-rollback"),
            Self::Send(id) => write!(f, "/v1/volumes/{id}/send"),
            Self::Receive(id) => write!(f, "/v1/volumes/{id}/receive"),
        }
    }
}

/// Reads which send point is meant: `snapshot=NAME`.
///
/// # Errors
/// What is wrong with it.
pub fn snapshot(query: &str) -> Result<SendName, String> {
    match SendQuery::parse(query)? {
        SendQuery::Snapshot { snapshot, from: None } => Ok(snapshot),
        _ => Err("only snapshot is known here".into()),
    }
}

/// Reads which snapshot is meant: `snapshot=NAME`.
///
/// # Errors
/// What is wrong with it.
pub fn snapshot_name(query: &str) -> Result<SnapshotName, String> {
    only_name(query)
}

/// Reads which snapshot is to be taken: `snapshot=NAME`.
///
/// # Errors
/// What is wrong with it.
pub fn new_snapshot_name(query: &str) -> Result<NewSnapshotName, String> {
    only_name(query)
}

fn only_name<T: FromStr<Err = ParseTokenError>>(query: &str) -> Result<T, String> {
    let name = query.strip_prefix("snapshot=").ok_or("snapshot=NAME is needed, and nothing else")?;
    name.parse().map_err(|error: ParseTokenError| error.to_string())
}

/// What is to be gone back to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollbackQuery {
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// Newer snapshots may be destroyed for it.
    pub destroy_newer: bool,
    /// The id of the request, chosen by who asks: to take back what may have been recorded.
    pub id: Option<Uuid>,
    /// The UID of the pod that had the volume when it was looked at, empty for none. Where another one has it by now, what
    /// was said yes to is something else. Without, nobody has looked.
    pub pod: Option<String>,
}

impl RollbackQuery {
    /// Reads the part of an address behind the `?`: `snapshot=NAME`, and in this order, each or not, `&id=UUID`, `&pod=UID`
    /// and `&destroy-newer`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(query: &str) -> Result<Self, String> {
        let (rest, destroy_newer) = match query.strip_suffix("&destroy-newer") {
            Some(rest) => (rest, true),
            None => (query, false),
        };
        let (rest, pod) = match rest.split_once("&pod=") {
            Some((rest, pod)) if pod.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')) => {
                (rest, Some(pod.to_owned()))
            }
            Some((_, pod)) => return Err(format!("pod={pod} is not the UID of a pod")),
            None => (rest, None),
        };
        let (rest, id) = match rest.split_once("&id=") {
            Some((rest, id)) => (rest, Some(uuid_of(id)?)),
            None => (rest, None),
        };
        let name = rest
            .strip_prefix("snapshot=")
            .ok_or("snapshot=NAME is needed, then &id=UUID, &pod=UID and &destroy-newer or nothing else")?;
        let snapshot = name.parse().map_err(|error: ParseTokenError| error.to_string())?;
        Ok(Self { snapshot, destroy_newer, id, pod })
    }
}

fn uuid_of(text: &str) -> Result<Uuid, String> {
    text.parse().map_err(|_| format!("id={text} is not a UUID"))
}

/// The part of an address behind the `?` that names the one request that is taken back: `id=UUID`, or nothing for any.
///
/// # Errors
/// What is wrong with it.
pub fn canceled(query: &str) -> Result<Option<Uuid>, String> {
    match query.strip_prefix("id=") {
        Some(id) => uuid_of(id).map(Some),
        None if query.is_empty() => Ok(None),
        None => Err("id=UUID is what there is, and nothing else".into()),
    }
}

impl fmt::Display for RollbackQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "snapshot={}", self.snapshot)?;
        if let Some(id) = self.id {
            write!(f, "&id={id}")?;
        }
        if let Some(pod) = &self.pod {
            write!(f, "&pod={pod}")?;
        }
        f.write_str(if self.destroy_newer { "&destroy-newer" } else { "" })
    }
}

/// What is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SendQuery {
    /// A snapshot, taken now where it is not there.
    Snapshot {
        /// Its name.
        snapshot: SendName,
        /// What the receiver has already; everything is sent without.
        from: Option<SendName>,
    },
    /// The rest of what broke off.
    Resume(ResumeToken),
}

impl SendQuery {
    /// Reads the part of an address behind the `?`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(query: &str) -> Result<Self, String> {
        let (mut snapshot, mut from, mut resume) = (None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let place = match key {
                "snapshot" => &mut snapshot,
                "from" => &mut from,
                "resume" => &mut resume,
                _ => return Err("only snapshot, from and resume are known here".into()),
            };
            // Empty is as good as left out.
            if !value.is_empty() && place.replace(value).is_some() {
                return Err(format!("{key} is given twice"));
            }
        }
        let wrong = |error: ParseTokenError| error.to_string();
        match (snapshot, from, resume) {
            (None, None, Some(token)) => Ok(Self::Resume(token.parse().map_err(wrong)?)),
            (Some(snapshot), from, None) => Ok(Self::Snapshot {
                snapshot: snapshot.parse().map_err(wrong)?,
                from: from.map(str::parse).transpose().map_err(wrong)?,
            }),
            (_, _, Some(_)) => Err("resume says all there is to say: leave snapshot and from out".into()),
            (None, _, None) => Err("snapshot is missing: the name of what is to be sent".into()),
        }
    }
}

impl fmt::Display for SendQuery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot { snapshot, from: None } => write!(f, "snapshot={snapshot}"),
            Self::Snapshot { snapshot, from: Some(from) } => write!(f, "snapshot={snapshot}&from={from}"),
            Self::Resume(token) => write!(f, "resume={token}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_as_they_are_written_and_no_others_are_read() {
        let id = VolumeId::from_name("a");
        let transfers = [Route::SendPoints(id), Route::RemoveSendPoint(id), Route::Send(id), Route::Receive(id)];
        let snapshots = [Route::Snapshots(id), Route::TakeSnapshot(id), Route::DestroySnapshot(id)];
        let rollbacks = [Route::RollbackPlan(id), Route::Rollback(id), Route::CancelRollback(id)];
        let others = rollbacks.into_iter().chain([Route::Doctor, Route::Properties(id)]);
        for route in transfers.into_iter().chain(snapshots).chain(others) {
            assert_eq!(Route::parse(&route.to_string()), Some(route));
        }
        let upper = format!("/v1/volumes/{}/send", id.to_string().to_uppercase());
        let simple = format!("/v1/volumes/{}/send", id.to_string().replace('-', ""));
        for path in ["", "/", "/v1/", "/v1/doctor/", "/v1/volumes/../doctor", "/v1/volumes//send", "/v2/doctor"] {
            assert_eq!(Route::parse(path), None, "{path}");
        }
        for path in [upper, simple, format!("/v1/volumes/{id}/send/"), format!("/v1/volumes/{id}"), format!("/{id}")] {
            assert_eq!(Route::parse(&path), None, "{path}");
        }
    }

    #[test]
    fn each_call_of_each_volume_on_each_node_has_an_audience_of_its_own() {
        let (a, b) = (VolumeId::from_name("a"), VolumeId::from_name("b"));
        let of = |id| {
            let transfers = [Route::SendPoints(id), Route::RemoveSendPoint(id), Route::Send(id), Route::Receive(id)];
            let snapshots = [Route::Snapshots(id), Route::TakeSnapshot(id), Route::DestroySnapshot(id)];
            let rollbacks = [Route::RollbackPlan(id), Route::Rollback(id), Route::CancelRollback(id)];
            transfers.into_iter().chain(snapshots).chain(rollbacks).chain([Route::Properties(id)])
        };
        let routes = || of(a).chain(of(b)).chain([Route::Doctor]);
        let all = ["n1", "n2"].iter().flat_map(|node| routes().map(|route| route.audience(node)));
        assert_eq!(all.collect::<std::collections::HashSet<_>>().len(), 46);
        assert_eq!(Route::Doctor.audience("n1"), "zpod.storage/n1/doctor");
        assert_eq!(Route::Send(a).audience("n1"), format!("zpod.storage/n1/send/{a}"));
    }

    #[test]
    fn queries_are_read_as_they_are_written_and_mistakes_are_named() {
        for query in ["snapshot=zpod-send-b", "snapshot=zpod-send-b&from=zpod-send-a", "resume=1-ab-cd"] {
            assert_eq!(SendQuery::parse(query).unwrap().to_string(), query);
        }
        assert!(SendQuery::parse("snapshot=b&from=&resume=").is_ok());
        assert_eq!(snapshot("snapshot=b").unwrap().as_str(), "zpod-send-b");
        for query in ["", "snapshot=b&from=a", "resume=1-ab", "snapshot=..%2f"] {
            assert!(snapshot(query).is_err(), "{query}");
        }
        assert_eq!(snapshot_name("snapshot=Before.1").unwrap().to_string(), "Before.1");
        for query in ["", "from=a", "snapshot=", "snapshot=a&snapshot=b", "snapshot=a%25b"] {
            assert!(snapshot_name(query).is_err() && new_snapshot_name(query).is_err(), "{query}");
        }
        assert_eq!(new_snapshot_name("snapshot=before").unwrap().to_string(), "before");
        assert!(snapshot_name("snapshot=zpod-x").is_ok() && new_snapshot_name("snapshot=zpod-x").is_err());
        let id = "00000000-0000-0000-0000-000000000007";
        for query in [
            "snapshot=Before.1",
            "snapshot=a&destroy-newer",
            &format!("snapshot=a&id={id}&pod=u-1&destroy-newer"),
            &format!("snapshot=a&id={id}&pod="),
            "snapshot=a&pod=u-1",
        ] {
            assert_eq!(RollbackQuery::parse(query).unwrap().to_string(), query);
        }
        assert_eq!(RollbackQuery::parse("snapshot=a&pod=").unwrap().pod.as_deref(), Some(""), "none, and looked at");
        assert_eq!(canceled(&format!("id={id}")).unwrap().unwrap().to_string(), id);
        assert!(canceled("").unwrap().is_none() && canceled("id=").is_err() && canceled("all").is_err());
        for query in [
            "",
            "destroy-newer",
            "snapshot=",
            "snapshot=a&destroy-newer=1",
            "snapshot=a&destroy-newer&clones",
            "snapshot=a&id=7",
            "snapshot=a&pod=a%20b",
            "snapshot=a&pod=a&pod=b",
        ] {
            assert!(RollbackQuery::parse(query).is_err(), "{query}");
        }
        for (query, why) in [
            ("", "snapshot is missing"),
            ("from=a", "snapshot is missing"),
            ("snapshot=a&snapshot=b", "twice"),
            ("snapshot=a&resume=1-ab", "leave snapshot"),
            ("snapshot=a%20b", "a-z"),
            ("resume=zz", "token"),
            ("raw=1", "only snapshot"),
        ] {
            let error = SendQuery::parse(query).unwrap_err();
            assert!(error.contains(why), "{query}: {error}");
        }
    }
}
