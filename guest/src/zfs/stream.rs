//! `zfs send` and `zfs receive`, whose standard output and input are the stream.

use std::process::Stdio;

use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use super::{DEADLINE, ERROR_TEXT, IMPORT_DEADLINE, Tools, bounded, json};
use crate::machine::Fault;
use crate::machine::streams::{Flow, Inward, Outward, SendPoint, What};
use crate::sys;

/// Options and snapshot of a send. `-w`: encrypted contents as they are on the disk, all others as they are stored.
fn arguments(dataset: &str, what: &What) -> Vec<String> {
    match what {
        What::Rest(token) => vec!["-t".to_owned(), token.clone()],
        What::Snapshot { snapshot, from } => {
            let since = from.iter().flat_map(|from| ["-i".to_owned(), format!("@{from}")]);
            let all = ["-w".to_owned()].into_iter().chain(since);
            all.chain([format!("{dataset}@{snapshot}")]).collect()
        }
    }
}

/// What `zfs send -n -P` says at its end: `size`, a tab, and bytes.
fn size(output: &str) -> Option<u64> {
    output.lines().find_map(|line| line.strip_prefix("size")?.trim().parse().ok())
}

fn end(name: &'static str, mut child: Child) -> JoinSet<Result<(), Fault>> {
    let stderr = child.stderr.take();
    let mut end = JoinSet::new();
    end.spawn(async move {
        // The child is killed with this task.
        let (stderr, status) = tokio::join!(bounded(stderr), child.wait());
        let status = status.map_err(|error| Fault::new(format!("{name}: {error}")))?;
        if status.success() {
            return Ok(());
        }
        let text: String = String::from_utf8_lossy(&stderr).trim().chars().take(ERROR_TEXT).collect();
        Err(Fault { busy: text.contains("busy"), ..Fault::new(format!("{name}: {status}: {text}")) })
    });
    end
}

impl Tools {
    /// Snapshots of a dataset, oldest first.
    pub async fn send_points(&self, dataset: &str) -> Result<Vec<SendPoint>, Fault> {
        let columns = "name,guid,creation,createtxg,referenced,used,userrefs,clones";
        let arguments = ["list", "-j", "-p", "-t", "snapshot", "-d", "1", "-o", columns, dataset];
        json::send_points(&self.run("zfs", &arguments, DEADLINE).await?, dataset)
    }

    /// Where a receive broke off.
    pub async fn resume_token(&self, dataset: &str) -> Result<Option<String>, Fault> {
        let output = self.run("zfs", &["get", "-j", "-p", "receive_resume_token", dataset], DEADLINE).await?;
        let token = json::dataset(&output, dataset)?.and_then(|mut found| found.remove("receive_resume_token"));
        Ok(token.filter(|token| token.len() > 1))
    }

    /// Forgets a receive that broke off.
    pub async fn forget_receive(&self, dataset: &str) -> Result<(), Fault> {
        self.run("zfs", &["receive", "-A", dataset], DEADLINE).await.map(drop)
    }

    /// How large a stream will be.
    pub async fn estimate(&self, dataset: &str, what: &What) -> Result<u64, Fault> {
        let all: Vec<_> = ["send", "-n", "-P"].map(str::to_owned).into_iter().chain(arguments(dataset, what)).collect();
        let output = self.run("zfs", &all, DEADLINE).await?;
        size(&String::from_utf8_lossy(&output)).ok_or_else(|| Fault::new("zfs send -n -P names no size"))
    }

    /// Begins to send.
    pub fn send(&self, dataset: &str, what: &What) -> Result<Outward, Fault> {
        let all: Vec<_> = ["send".to_owned()].into_iter().chain(arguments(dataset, what)).collect();
        let mut command = self.command("zfs", &all);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = spawn(command)?;
        let data = child.stdout.take().ok_or_else(|| Fault::new("zfs send has no output"))?;
        Ok(Flow { data: Box::new(data), end: end("zfs send", child) })
    }

    /// Gives a dataset another name. `-u`: nothing is unmounted or mounted.
    pub async fn rename(&self, dataset: &str, to: &str) -> Result<(), Fault> {
        self.run("zfs", &["rename", "-u", dataset, to], DEADLINE).await.map(drop)
    }

    /// Destroys a dataset and its snapshots.
    pub async fn destroy(&self, dataset: &str) -> Result<(), Fault> {
        self.run("zfs", &["destroy", "-r", dataset], IMPORT_DEADLINE).await.map(drop)
    }

    /// Begins to receive. `-s`: what came before a break is kept. `-F`: what was written since the last snapshot goes.
    /// `-u`: nothing is mounted.
    ///
    /// The tool unmounts a file system that is received in full, though the kernel needs no such thing: it puts the new
    /// contents below the mounts there are. It has mounts of its own to do so.
    pub fn receive(&self, dataset: &str, new: bool) -> Result<Inward, Fault> {
        let replace = (!new).then_some("-F");
        let all: Vec<_> = ["receive", "-s", "-u"].into_iter().chain(replace).chain([dataset]).collect();
        let mut command = self.command("zfs", &all);
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        sys::with_own_mounts(&mut command);
        let mut child = spawn(command)?;
        let data = child.stdin.take().ok_or_else(|| Fault::new("zfs receive has no input"))?;
        Ok(Flow { data: Box::new(data), end: end("zfs receive", child) })
    }
}

fn spawn(mut command: Command) -> Result<Child, Fault> {
    command.stderr(Stdio::piped()).kill_on_drop(true);
    command.spawn().map_err(|error| Fault::new(format!("zfs: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_stream_is_read_from_what_the_tool_prints() {
        assert_eq!(size("full\tzpod-1/data@zpod-send-a\t1234\nsize\t1234\n"), Some(1234));
        assert_eq!(size("incremental\ta\tzpod-1/data@b\t77\nsize\t77\n"), Some(77));
        assert_eq!(size(""), None);
        assert_eq!(size("size\tx\n"), None);
    }

    #[test]
    fn a_stream_is_raw_and_goes_from_where_the_receiver_is() {
        let what = What::Snapshot { snapshot: "zpod-send-b".into(), from: Some("zpod-send-a".into()) };
        assert_eq!(arguments("zpod-1/data", &what), ["-w", "-i", "@zpod-send-a", "zpod-1/data@zpod-send-b"]);
        assert_eq!(arguments("zpod-1/data", &What::Rest("1-ab".into())), ["-t", "1-ab"]);
    }
}
