use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Resource as _;
use kube::api::{Patch, PatchParams};
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use zpod_kubernetes::crd::{Scrub as Last, ZfsVolume};

use crate::cluster::Cluster;
use crate::options::{Format, Scrub};
use crate::output::show;
use crate::{Failure, progress};

/// Owns `spec.scrubRequestedAt`.
const MANAGER: &str = "kubectl-zpod-scrub";
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What became of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Outcome {
    volume: String,
    /// When it was asked for.
    requested_at: Time,
    /// `Requested`, or as `status.pool.lastScrub` says once it was waited for.
    state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    end_time: Option<Time>,
    /// Errors it found, once it was waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    errors: Option<i64>,
}

pub(super) async fn run(cluster: &Cluster, options: &Scrub, format: Format) -> Result<(), Failure> {
    let named = options.target.named()?;
    let volume = cluster.volume(&named).await?;
    let runs = volume.status.as_ref().is_some_and(|status| status.publication.is_some());
    if options.wait && !runs {
        let what = format!("no pod uses {named}, and only a running guest can scrub its pool");
        return Err(Failure::failed(what, "start its pod, or leave --wait out: it begins with the next start"));
    }
    let before = last_of(&volume);
    let mut outcome = request(cluster, &volume).await?;
    if options.wait {
        let last = wait(cluster, &outcome.volume, before, options.timeout).await?;
        outcome = Outcome { state: last.state, end_time: last.end_time, errors: Some(last.errors), ..outcome };
    }
    show(format, &outcome, || text(&named.to_string(), &outcome, runs))?;
    match outcome.errors {
        Some(errors) if errors > 0 => Err(Failure::failed(
            format!("the scrub of {named} found {errors} errors"),
            "`kubectl zpod status` says what is damaged; restore those files from a snapshot or a backup",
        )),
        _ if outcome.state == "Canceled" => {
            Err(Failure::failed("the scrub was stopped before its end", "ask for it again"))
        }
        _ => Ok(()),
    }
}

/// Says in the volume's object that a scrub is wanted that begins after now.
async fn request(cluster: &Cluster, volume: &ZfsVolume) -> Result<Outcome, Failure> {
    let name = volume.metadata.name.clone().unwrap_or_default();
    // Kubernetes keeps whole seconds.
    let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap_or(Timestamp::UNIX_EPOCH);
    let requested_at = Time(now);
    let object = json!({
        "apiVersion": ZfsVolume::api_version(&()), "kind": ZfsVolume::kind(&()), "metadata": {"name": name},
        "spec": {"scrubRequestedAt": requested_at},
    });
    let params = PatchParams::apply(MANAGER).force();
    let patched = cluster.volumes().patch(&name, &params, &Patch::Apply(object)).await;
    patched.map_err(|error| Failure::api("the scrub can't be asked for", &error))?;
    Ok(Outcome { volume: name, requested_at, state: "Requested".into(), end_time: None, errors: None })
}

fn last_of(volume: &ZfsVolume) -> Option<Last> {
    volume.status.as_ref()?.pool.as_ref()?.last_scrub.clone()
}

async fn wait(cluster: &Cluster, name: &str, before: Option<Last>, patience: Duration) -> Result<Last, Failure> {
    let bar = progress::waiting("waiting for the node to begin");
    let begun = Instant::now();
    loop {
        let volume = cluster.volumes().get(name).await.map_err(|error| Failure::api("the volume", &error))?;
        let status = volume.status.clone().unwrap_or_default();
        match last_of(&volume) {
            Some(last) if is_over(&last, before.as_ref()) => {
                bar.finish_and_clear();
                return Ok(last);
            }
            Some(last) if last.state == "Scanning" => bar.set_message(format!("scrubbing, {} errors", last.errors)),
            Some(last) if last.state == "Paused" => bar.set_message("the scrub is paused"),
            _ => {}
        }
        if status.publication.is_none() {
            bar.finish_and_clear();
            return Err(Failure::failed(
                "the pod has ended, and the scrub with it",
                "it begins again with the next start",
            ));
        }
        if begun.elapsed() >= patience {
            bar.finish_and_clear();
            let what = format!("the scrub has not ended in {} s", patience.as_secs());
            return Err(Failure::timed_out(what, "it goes on; `kubectl zpod status -o json` shows lastScrub"));
        }
        tokio::time::sleep(LOOK_EVERY.min(patience)).await;
    }
}

/// Whether a scrub has ended since. Told by the end itself: the guest's clock may be wrong.
fn is_over(last: &Last, before: Option<&Last>) -> bool {
    let ended = matches!(last.state.as_str(), "Finished" | "Canceled");
    let other = before.is_none_or(|before| before.end_time != last.end_time || before.state != last.state);
    ended && other
}

fn text(given: &str, outcome: &Outcome, runs: bool) -> String {
    match outcome.errors {
        Some(errors) => format!("{given}: the scrub has {}, {errors} errors\n", outcome.state.to_lowercase()),
        None if runs => {
            format!("{given}: scrub asked for; `kubectl zpod scrub {given} --wait` would wait for its end\n")
        }
        None => format!("{given}: scrub asked for; it begins when a pod uses the volume\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::fake::{Answers, path, volume};
    use crate::options::Target;

    fn scrubbed(state: &str, end: Option<&str>, errors: i64) -> serde_json::Value {
        json!({"phase": "Ready",
               "publication": {"targetPath": "/t", "token": "00000000-0000-0000-0000-000000000001", "bootId": "b"},
               "pool": {"health": "Online", "lastScrub": {"state": state, "endTime": end, "errors": errors}}})
    }

    fn options(wait: bool) -> Scrub {
        Scrub {
            target: Target { claim: None, id: Some(volume("", json!(null)).0.parse().unwrap()) },
            wait,
            timeout: Duration::from_secs(5),
        }
    }

    #[tokio::test]
    async fn a_scrub_is_asked_for_in_its_own_field_and_in_nobody_elses() {
        let (id, object) = volume("db", scrubbed("Finished", Some("2026-01-01T00:00:00Z"), 0));
        let answers = Answers::default().with(&path(&id), object);
        run(&answers.cluster(), &options(false), Format::Json).await.unwrap();
        let writes = answers.writes();
        assert_eq!(writes.len(), 1);
        assert!(writes[0].query.contains("fieldManager=kubectl-zpod-scrub"), "{}", writes[0].query);
        let spec = writes[0].body["spec"].as_object().unwrap();
        assert_eq!(spec.keys().collect::<Vec<_>>(), ["scrubRequestedAt"]);
        assert!(writes[0].body.get("status").is_none());
    }

    #[tokio::test]
    async fn waiting_ends_with_the_scrub_that_was_asked_for_and_not_with_the_one_before() {
        let before = Some("2026-01-01T00:00:00Z");
        let (id, object) = volume("db", scrubbed("Finished", before, 0));
        let answers = Answers::default().with(&path(&id), object);
        let later = answers.clone();
        tokio::spawn(async move {
            for (after, state, end, errors) in
                [(1, "Scanning", None, 0), (3, "Finished", Some("2026-01-02T00:00:00Z"), 2)]
            {
                tokio::time::sleep(Duration::from_secs(after)).await;
                let (id, object) = volume("db", scrubbed(state, end, errors));
                drop(later.clone().with(&path(&id), object));
            }
        });
        let options = Scrub { timeout: Duration::from_secs(60), ..options(true) };
        tokio::time::pause();
        let failure = run(&answers.cluster(), &options, Format::Json).await.unwrap_err();
        assert!(failure.to_string().contains("found 2 errors"), "{failure}");
    }

    #[tokio::test]
    async fn nobody_is_left_waiting_where_no_guest_can_scrub() {
        let (id, object) = volume("db", json!({"phase": "Ready"}));
        let answers = Answers::default().with(&path(&id), object);
        let failure = run(&answers.cluster(), &options(true), Format::Table).await.unwrap_err();
        assert!(failure.to_string().contains("no pod uses"), "{failure}");
        assert!(answers.writes().is_empty());
        let (id, object) = volume("db", scrubbed("Scanning", None, 0));
        let answers = answers.with(&path(&id), object);
        tokio::time::pause();
        let failure = run(&answers.cluster(), &options(true), Format::Table).await.unwrap_err();
        assert_eq!(failure.kind.code(), 5);
    }
}
