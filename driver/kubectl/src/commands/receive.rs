use std::io::IsTerminal as _;

use futures_util::{StreamExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame};
use tokio::io::AsyncReadExt as _;
use zpod_admin::SendPoints;
use zpod_kubernetes::crd::ZfsVolume;

use super::helper::Helper;
use super::transfer::{Way, with_guest};
use crate::admin::Out;
use crate::options::{Format, Receive};
use crate::output::show;
use crate::text::size;
use crate::{Failure, progress};

/// What is read at once.
const CHUNK: usize = 256 << 10;

pub(super) async fn run(way: Way<'_>, options: &Receive, format: Format) -> Result<(), Failure> {
    if !options.token && std::io::stdin().is_terminal() {
        return Err(Failure::usage(
            "there is nothing to read: stdin is a terminal",
            "read a file (< backup.zfs) or another volume (kubectl zpod send ... |); --token shows where it broke off",
        ));
    }
    let token = options.token;
    let resume = options.resume;
    let named = options.target.named()?;
    let name = &named.to_string();
    with_guest(
        way,
        &named,
        &options.helper,
        |volume| free(volume, name),
        |reached| async move {
            let points = reached.admin.send_points(reached.id).await?;
            if token {
                return where_it_broke_off(&points, name, format);
            }
            check(&points, resume, name)?;
            let bar = progress::bytes(format!("receiving into {name}"), None);
            let read = bar.clone();
            let received = reached.admin.receive(reached.id, stdin(move |bytes| read.inc(bytes))).await;
            bar.finish_and_clear();
            let received = received.map_err(|failure| {
                let text = failure.to_string();
                let what = text.trim_end().trim_start_matches("error: ").to_owned();
                let remedy =
                    format!("if it broke off, `kubectl zpod receive {name} --token` has the token to go on with");
                Failure::new(failure.kind, what, remedy)
            })?;
            show(format, &received, || {
                format!("{name} has {} now ({} read)\n", received.snapshot, size(received.bytes))
            })
        },
    )
    .await
}

/// A volume that a program uses is not replaced under its hands.
fn free(volume: &ZfsVolume, name: &str) -> Result<(), Failure> {
    let publication = volume.status.as_ref().and_then(|status| status.publication.as_ref());
    let pod = publication.and_then(|publication| publication.pod.as_ref()).filter(|pod| !Helper::is_one(&pod.name));
    match pod {
        None => Ok(()),
        Some(pod) => Err(Failure::failed(
            format!("pod {}/{} uses {name}, and would see its files replaced", pod.namespace, pod.name),
            "end that pod first, or receive into a new claim",
        )),
    }
}

fn check(points: &SendPoints, resume: bool, name: &str) -> Result<(), Failure> {
    match (&points.resume_token, resume) {
        (Some(_), false) => Err(Failure::failed(
            format!("a receive into {name} broke off before"),
            format!(
                "go on: kubectl zpod send SOURCE --resume \"$(kubectl zpod receive {name} --token)\" | kubectl zpod receive \
                 {name} --resume; or receive into a new claim"
            ),
        )),
        (None, true) => Err(Failure::failed(
            format!("no receive into {name} broke off"),
            "leave --resume out: the stream is received from its beginning",
        )),
        _ => Ok(()),
    }
}

/// The token alone, so that a shell can pass it on.
fn where_it_broke_off(points: &SendPoints, name: &str, format: Format) -> Result<(), Failure> {
    match &points.resume_token {
        Some(token) => show(format, points, || format!("{token}\n")),
        None => Err(Failure::not_found(format!("no receive into {name} broke off"), "")),
    }
}

/// What comes in at stdin, as a body. An error of it is none of the stream's ends.
fn stdin(mut passed: impl FnMut(u64) + Send + 'static) -> Out {
    let chunks = stream::unfold(tokio::io::stdin(), |mut stdin| async {
        let mut chunk = vec![0; CHUNK];
        match stdin.read(&mut chunk).await {
            Ok(0) => None,
            Ok(read) => {
                chunk.truncate(read);
                Some((Ok(Bytes::from(chunk)), stdin))
            }
            Err(error) => Some((Err(error), stdin)),
        }
    });
    let frames = chunks.map(move |chunk| {
        chunk.map(|data: Bytes| {
            passed(data.len() as u64);
            Frame::data(data)
        })
    });
    StreamBody::new(Box::pin(frames)).boxed_unsync()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::fake::volume;
    use serde_json::json;

    fn used_by(pod: &str) -> ZfsVolume {
        let (_, object) = volume(
            "copy",
            json!({"phase": "Ready", "publication": {
            "targetPath": "/t", "token": "00000000-0000-0000-0000-000000000001", "bootId": "b",
            "pod": {"namespace": "prod", "name": pod}}}),
        );
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn nothing_is_replaced_under_a_programs_hands() {
        let failure = free(&used_by("db-0"), "copy").unwrap_err();
        assert!(failure.to_string().contains("pod prod/db-0 uses copy"), "{failure}");
        assert!(free(&used_by("zpod-transfer-19ad2c3f1b0-2"), "copy").is_ok());
    }

    #[test]
    fn going_on_and_beginning_anew_are_not_mixed_up() {
        let broken = SendPoints { resume_token: Some("1-ab".into()), ..SendPoints::default() };
        assert!(check(&broken, false, "copy").unwrap_err().to_string().contains("--resume"));
        assert!(check(&broken, true, "copy").is_ok());
        assert!(check(&SendPoints::default(), true, "copy").is_err());
        assert!(check(&SendPoints::default(), false, "copy").is_ok());
        assert!(where_it_broke_off(&broken, "copy", Format::Table).is_ok());
        assert_eq!(where_it_broke_off(&SendPoints::default(), "copy", Format::Table).unwrap_err().kind.code(), 3);
    }
}
