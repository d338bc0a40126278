use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use zpod_admin::{ResumeToken, SendName};

/// Status, properties, scrubs, backups and a doctor for ZFS volumes that live in pods.
#[derive(Debug, Clone, Parser)]
#[command(name = "kubectl-zpod", bin_name = "kubectl zpod", version)]
pub struct Options {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// The kubeconfig file. Else KUBECONFIG, or ~/.kube/config.
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// The context in it.
    #[arg(long, global = true)]
    pub(crate) context: Option<String>,
    /// The namespace of claims. Else the context's.
    #[arg(short, long, global = true)]
    pub(crate) namespace: Option<String>,
    /// How to show what was found. The JSON is stable: docs/kubectl-zpod.md.
    #[arg(short, long, global = true, value_enum, default_value = "table")]
    pub(crate) output: Format,
    /// The namespace that zpod is installed in.
    #[arg(long, global = true, env = "ZPOD_NAMESPACE", default_value = "zpod-system")]
    pub(crate) zpod_namespace: String,
    /// The admin socket of `zpod --standalone` on this machine, instead of a cluster. Volumes are then named by their
    /// ids.
    #[arg(long, global = true, env = "ZPOD_ADMIN_ENDPOINT", value_name = "unix:///PATH", value_parser = socket)]
    pub(crate) admin_endpoint: Option<PathBuf>,
}

/// How to show what was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs.
    Json,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Command {
    /// What volumes there are, and how they are.
    Status(Status),
    /// Use and errors, the most interesting first.
    Top(Top),
    /// Have all data of a volume read and checked.
    Scrub(Scrub),
    /// Look at properties of a volume, or change them.
    #[command(subcommand)]
    Props(Props),
    /// The snapshots of a volume.
    Snapshots(Snapshots),
    /// What is wrong with nodes, and how to mend it.
    Doctor(Doctor),
    /// Write a volume out as a ZFS stream.
    Send(Send),
    /// Read a ZFS stream into a new volume.
    Receive(Receive),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Status {
    /// A PersistentVolumeClaim, or the id of a volume. All of the namespace, if it is not given.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: Option<String>,
    /// Of all namespaces.
    #[arg(short = 'A', long, conflicts_with = "volume")]
    pub(crate) all_namespaces: bool,
    /// What hangs together: claim, volume, dataset, snapshots, clones.
    #[arg(long)]
    pub(crate) tree: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Top {
    /// Of all namespaces.
    #[arg(short = 'A', long)]
    pub(crate) all_namespaces: bool,
    /// What comes first.
    #[arg(long, value_enum, default_value = "errors")]
    pub(crate) sort: Sort,
    /// Show it again and again, until Ctrl-C.
    #[arg(short, long)]
    pub(crate) watch: bool,
    /// Seconds between two looks.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) interval: u64,
}

/// What comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sort {
    /// Volumes with errors, then the fullest.
    Errors,
    /// The fullest, by used over capacity.
    Full,
    /// The largest, by used bytes.
    Used,
    /// The best compressed.
    Ratio,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Scrub {
    /// A PersistentVolumeClaim, or the id of a volume.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: String,
    /// Wait until it has ended; fail if it found errors.
    #[arg(short, long)]
    pub(crate) wait: bool,
    /// How long to wait, such as 90s, 30m, 12h.
    #[arg(long, default_value = "12h", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum Props {
    /// What was asked for: by the class, and by changes since.
    Get(PropsGet),
    /// Change properties; the running pod gets them at once.
    Set(PropsSet),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PropsGet {
    /// A PersistentVolumeClaim, or the id of a volume.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: String,
    /// These only.
    #[arg(value_name = "KEY")]
    pub(crate) keys: Vec<String>,
    /// As the guest says they are, instead of as they were asked for. Needs a running pod.
    #[arg(long)]
    pub(crate) live: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PropsSet {
    /// A PersistentVolumeClaim, or the id of a volume.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: String,
    /// Such as compression=zstd.
    #[arg(value_name = "KEY=VALUE", required = true, value_parser = pair)]
    pub(crate) changes: Vec<(String, String)>,
    /// Don't wait until the node has taken them over.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait, such as 90s, 30m, 12h.
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Snapshots {
    /// A PersistentVolumeClaim, or the id of a volume.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: String,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Doctor {
    /// A node. All of them, if it is not given.
    pub(crate) node: Option<String>,
    /// Show what is right, too.
    #[arg(long)]
    pub(crate) all: bool,
}

/// A pod that is made where none runs.
#[derive(Debug, Clone, Args)]
pub(crate) struct HelperOptions {
    /// Fail where no pod runs, instead of starting one for the time of the transfer.
    #[arg(long)]
    pub(crate) no_helper: bool,
    /// The image of that pod. It only has to stay alive.
    #[arg(long, default_value = "registry.k8s.io/pause:3.10")]
    pub(crate) helper_image: String,
    /// Its RuntimeClass.
    #[arg(long, default_value = "kata-zpod")]
    pub(crate) runtime_class: String,
    /// How long it may take to start, such as 90s, 5m.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) helper_timeout: Duration,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Send {
    /// A PersistentVolumeClaim, or the id of a volume.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: String,
    /// Send what has changed since this snapshot, which the receiver has.
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    pub(crate) from: Option<SendName>,
    /// The snapshot to send: taken now where it is not there. Named after the time, if it is not given.
    #[arg(long, value_name = "NAME", conflicts_with = "resume")]
    pub(crate) snapshot: Option<SendName>,
    /// Go on where a receive broke off: what `kubectl zpod receive --token` shows.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) resume: Option<ResumeToken>,
    /// List what was sent and received before, and send nothing.
    #[arg(long, conflicts_with_all = ["from", "snapshot", "resume"])]
    pub(crate) list: bool,
    #[command(flatten)]
    pub(crate) helper: HelperOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Receive {
    /// A PersistentVolumeClaim, or the id of a volume. Bound or not; what is in it is replaced.
    #[arg(value_name = "PVC|VOLUME")]
    pub(crate) volume: String,
    /// Go on where it broke off: what is read is what `kubectl zpod send --resume` sends.
    #[arg(long)]
    pub(crate) resume: bool,
    /// Show where it broke off, for `kubectl zpod send --resume`, and receive nothing.
    #[arg(long, conflicts_with = "resume")]
    pub(crate) token: bool,
    #[command(flatten)]
    pub(crate) helper: HelperOptions,
}

fn socket(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text.strip_prefix("unix://").unwrap_or(text));
    if path.is_absolute() {
        Ok(path.into())
    } else {
        Err("write unix:///path, such as unix:///run/zpod/admin.sock".into())
    }
}

fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(key, _)| !key.is_empty());
    pair.map(|(key, value)| (key.into(), value.into())).ok_or_else(|| "write key=value".into())
}

fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let seconds = match unit {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        _ => return Err("write seconds, or a number with s, m or h".into()),
    };
    let number: u32 = number.parse().map_err(|_| "write seconds, or a number with s, m or h")?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Options, clap::Error> {
        Options::try_parse_from(std::iter::once("kubectl-zpod").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Options::command().debug_assert();
    }

    #[test]
    fn flags_of_kubectl_go_before_and_behind_the_command() {
        for line in ["-n prod --context c status db -o json", "status db -n prod -o json --context c"] {
            let options = parse(line).unwrap();
            assert_eq!(options.global.namespace.as_deref(), Some("prod"));
            assert_eq!(options.global.context.as_deref(), Some("c"));
            assert_eq!(options.global.output, Format::Json);
        }
    }

    #[test]
    fn commands_are_read_as_the_documentation_writes_them() {
        for line in [
            "status",
            "status -A --tree",
            "top --watch --sort full",
            "scrub data-db-0 --wait --timeout 30m",
            "props get data-db-0 compression atime --live",
            "props set data-db-0 compression=zstd atime=off",
            "snapshots data-db-0",
            "doctor n1 --all",
            "send data-db-0 --from monday --snapshot tuesday",
            "send data-db-0 --resume 1-ab-cd",
            "receive copy --resume",
            "receive copy --token",
            "send 2d0f3c1e-8f5a-5d2a-9c4b-0123456789ab --admin-endpoint unix:///run/zpod/admin.sock",
        ] {
            parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_asked() {
        for line in [
            "",
            "status db -A",
            "props set db",
            "props set db compression",
            "props set db =zstd",
            "scrub db --timeout soon",
            "send db --from a@b",
            "send db --resume 1-ab --from monday",
            "send db --list --snapshot x",
            "top --interval 0",
            "doctor -o yaml",
            "status --admin-endpoint run/admin.sock",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [("5", 5), ("90s", 90), ("2m", 120), ("12h", 43200)] {
            assert_eq!(duration(text).unwrap(), Duration::from_secs(seconds));
        }
        for text in ["", "m", "-1s", "1d", "99999999999h"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
