use std::io::IsTerminal as _;

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::io::AsyncWriteExt as _;
use zpod_admin::{SendName, SendPoint, SendPoints, SendQuery};

use super::transfer::{Reached, Way, with_guest};
use crate::failure::with_causes;
use crate::options::{Format, Send};
use crate::output::show;
use crate::text::{size, table, when};
use crate::{Failure, progress};

pub(super) async fn run(way: Way<'_>, options: &Send, format: Format) -> Result<(), Failure> {
    if !options.list && options.remove.is_empty() && std::io::stdout().is_terminal() {
        return Err(Failure::usage(
            "a ZFS stream is nothing for a terminal",
            "send it to a file (> backup.zfs), or on (| kubectl zpod receive ...)",
        ));
    }
    let query = match &options.resume {
        Some(token) => SendQuery::Resume(token.clone()),
        None => SendQuery::Snapshot {
            snapshot: options.snapshot.clone().map_or_else(named_after_the_time, Ok)?,
            from: options.from.clone(),
        },
    };
    let named = options.target.named()?;
    with_guest(
        way,
        &named,
        &options.helper,
        |_| Ok(()),
        |reached| async move {
            if options.list {
                return list(&reached, format).await;
            }
            if !options.remove.is_empty() {
                return remove(&reached, &options.remove, format).await;
            }
            let (stream, estimate) = reached.admin.send(reached.id, &query).await?;
            let sent = write(stream, estimate).await?;
            match &query {
                SendQuery::Snapshot { snapshot, .. } => eprintln!(
                    "sent {} ({sent} bytes) as {snapshot}; the next time, what has changed since: --from {snapshot}",
                    size(sent)
                ),
                SendQuery::Resume(_) => eprintln!("sent the rest: {} ({sent} bytes)", size(sent)),
            }
            Ok(())
        },
    )
    .await
}

/// To the second, so that two backups of a day have names of their own.
fn named_after_the_time() -> Result<SendName, Failure> {
    let name = Timestamp::now().strftime("%Y%m%d-%H%M%S").to_string();
    name.parse().map_err(|error| Failure::failed(format!("{error}"), "give --snapshot"))
}

async fn write(mut stream: Incoming, estimate: Option<u64>) -> Result<u64, Failure> {
    let bar = progress::bytes("sending", estimate);
    let mut out = tokio::io::stdout();
    let mut sent = 0;
    let stdout = |error: std::io::Error| {
        Failure::failed(
            format!("stdout: {error}"),
            "see whether there is room where it goes, and whether its reader still runs",
        )
    };
    while let Some(frame) = stream.frame().await {
        let frame = frame.map_err(|error| {
            bar.abandon();
            let what = format!("the stream broke off after {sent} bytes: {}", with_causes(&error));
            let remedy = "the log of zpod-node says why. A volume that was receiving it has kept what came: `kubectl zpod \
                          receive PVC --token` has the token to go on with. A file has to be written anew";
            Failure::failed(what, remedy)
        })?;
        if let Some(data) = frame.data_ref() {
            out.write_all(data).await.map_err(stdout)?;
            sent += data.len() as u64;
            bar.set_position(sent);
        }
    }
    out.flush().await.map_err(stdout)?;
    bar.finish_and_clear();
    Ok(sent)
}

async fn remove(reached: &Reached, points: &[SendName], format: Format) -> Result<(), Failure> {
    for point in points {
        let removed = reached.admin.remove_send_point(reached.id, point).await?;
        show(format, &removed, || format!("{} is removed; no stream can be sent from it on\n", removed.snapshot))?;
    }
    Ok(())
}

async fn list(reached: &Reached, format: Format) -> Result<(), Failure> {
    let points = reached.admin.send_points(reached.id).await?;
    show(format, &points, || text(&points))
}

/// Snapshots in a pool.
pub(super) fn in_pool(snapshots: &[SendPoint]) -> String {
    let row = |snapshot: &SendPoint| {
        let taken = i64::try_from(snapshot.created).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
        vec![
            snapshot.name.clone(),
            taken.map_or_else(|| "-".into(), |taken| when(&Time(taken))),
            size(snapshot.referenced_bytes),
            size(snapshot.used_bytes),
            snapshot.guid.clone(),
        ]
    };
    table(&["SNAPSHOT", "TAKEN", "REFERS", "USED", "GUID"], snapshots.iter().map(row))
}

fn text(points: &SendPoints) -> String {
    let mut text = in_pool(&points.points);
    if let Some(token) = &points.resume_token {
        text.push_str(&format!("\na receive broke off; go on with `kubectl zpod send SOURCE --resume {token}`\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sent_before_is_listed_with_what_to_go_on_with() {
        let point = SendPoint {
            name: "zpod-send-monday".into(),
            guid: "18446744073709551615".into(),
            created: 1_764_000_000,
            referenced_bytes: 3 << 30,
            used_bytes: 0,
        };
        let text = text(&SendPoints { points: vec![point], resume_token: Some("1-ab".into()) });
        let want = "\
SNAPSHOT           TAKEN                  REFERS   USED   GUID
zpod-send-monday   2025-11-24T16:00:00Z   3Gi      0      18446744073709551615

a receive broke off; go on with `kubectl zpod send SOURCE --resume 1-ab`
";
        assert_eq!(text, want, "\n{text}");
    }

    #[test]
    fn the_time_makes_a_name_that_may_be_one() {
        assert!(named_after_the_time().unwrap().as_str().starts_with("zpod-send-20"));
    }
}
