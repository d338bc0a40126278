use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use zpod_admin::{NewSnapshotName, ResumeToken, SendName, SnapshotName};
use zpod_volume::VolumeId;

use crate::Failure;

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
    /// Take a snapshot in a volume's pool: at once, browsable in the pod, and gone with the volume.
    Snapshot(Snapshot),
    /// The snapshots of a volume: copies of it on its node, and those in its pool.
    Snapshots(Snapshots),
    /// Have a volume go back to a snapshot in its pool, at its next start.
    Rollback(Rollback),
    /// Undo the deletion of ZfsVolumes and ZfsSnapshots whose data nobody asked to destroy.
    Adopt(Adopt),
    /// What is wrong with nodes, and how to mend it.
    Doctor(Doctor),
    /// Write a volume out as a ZFS stream.
    Send(Send),
    /// Read a ZFS stream into a new volume.
    Receive(Receive),
}

/// Which volume. What is given without a flag is always a claim: whoever makes claims may give them any name, that of
/// another's volume too.
#[derive(Debug, Clone, Args)]
pub(crate) struct Target {
    /// A PersistentVolumeClaim. Without a cluster, the id of a volume.
    #[arg(value_name = "PVC")]
    pub(crate) claim: Option<String>,
    /// The id of a volume (the name of its ZfsVolume), in place of a claim.
    #[arg(long = "volume", value_name = "ID")]
    pub(crate) id: Option<VolumeId>,
}

/// One volume, as somebody names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Named {
    /// By its claim.
    Claim(String),
    /// By its id.
    Id(VolumeId),
}

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Claim(name) => f.write_str(name),
            Self::Id(id) => write!(f, "--volume {id}"),
        }
    }
}

impl Target {
    /// The volume that is meant, if one is.
    pub(crate) fn maybe(&self) -> Result<Option<Named>, Failure> {
        match (&self.claim, self.id) {
            (Some(_), Some(_)) => Err(Failure::usage(
                "a claim and --volume are given, and only one can be meant",
                "leave one of them out",
            )),
            (Some(claim), None) => Ok(Some(Named::Claim(claim.clone()))),
            (None, Some(id)) => Ok(Some(Named::Id(id))),
            (None, None) => Ok(None),
        }
    }

    /// The volume that is meant.
    pub(crate) fn named(&self) -> Result<Named, Failure> {
        self.maybe()?.ok_or_else(|| Failure::usage("no volume is named", "give a claim, or --volume and its id"))
    }

    /// The volume that is meant, where more words follow the claim: with --volume the first is one of them.
    fn and_more(&self) -> Result<(Named, Option<String>), Failure> {
        match self.id {
            Some(id) => Ok((Named::Id(id), self.claim.clone())),
            None => Ok((self.named()?, None)),
        }
    }
}

impl Named {
    /// The id that is meant without a cluster, where there are no claims.
    pub(crate) fn on_one_machine(&self) -> Result<VolumeId, Failure> {
        match self {
            Self::Id(id) => Ok(*id),
            Self::Claim(name) => name.parse().map_err(|_| {
                Failure::usage(format!("{name} is not the id of a volume"), "on one machine, volumes have ids only")
            }),
        }
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Status {
    // All of the namespace, if none is given.
    #[command(flatten)]
    pub(crate) target: Target,
    /// Of all namespaces.
    #[arg(short = 'A', long, conflicts_with_all = ["claim", "id"])]
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
    #[command(flatten)]
    pub(crate) target: Target,
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
    #[command(flatten)]
    pub(crate) target: Target,
    /// These only.
    #[arg(value_name = "KEY")]
    pub(crate) keys: Vec<String>,
    /// As the guest says they are, instead of as they were asked for. Needs a running pod.
    #[arg(long)]
    pub(crate) live: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PropsSet {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Such as compression=zstd.
    #[arg(value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) changes: Vec<(String, String)>,
    /// Don't wait until the node has taken them over.
    #[arg(long)]
    pub(crate) no_wait: bool,
    /// How long to wait, such as 90s, 30m, 12h.
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Snapshot {
    #[command(flatten)]
    pub(crate) target: Target,
    /// What stands behind the @: A-Z, a-z, 0-9, _, ., : and -, and not zpod- at its beginning. Named after the time, if it is
    /// not given.
    #[arg(value_name = "NAME")]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) helper: HelperOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Snapshots {
    #[command(flatten)]
    pub(crate) target: Target,
    /// Destroy this snapshot in the volume's pool, and list none. More than once for more of them. Copies on the node are
    /// destroyed by the deletion of their VolumeSnapshots.
    #[arg(long, value_name = "NAME")]
    pub(crate) remove: Vec<SnapshotName>,
    #[command(flatten)]
    pub(crate) helper: HelperOptions,
}

impl Snapshot {
    /// The volume that is meant, and the name, if one is given.
    pub(crate) fn meant(&self) -> Result<(Named, Option<NewSnapshotName>), Failure> {
        let (named, first) = self.target.and_more()?;
        if let (Some(first), Some(second)) = (&first, &self.name) {
            return Err(Failure::usage(format!("two names are given: {first} and {second}"), "give one"));
        }
        let name = first.as_ref().or(self.name.as_ref()).map(|name| name.parse()).transpose();
        let name = name.map_err(|error: zpod_admin::ParseTokenError| Failure::usage(error.to_string(), ""))?;
        Ok((named, name))
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Rollback {
    /// A PersistentVolumeClaim, an @ and the snapshot. With --volume the snapshot alone, with --cancel the claim alone.
    #[arg(value_name = "PVC@NAME")]
    pub(crate) what: Option<String>,
    /// The id of a volume (the name of its ZfsVolume), in place of a claim.
    #[arg(long = "volume", value_name = "ID")]
    pub(crate) id: Option<VolumeId>,
    /// Destroy the snapshots that are newer. Without, they are in the way.
    #[arg(long)]
    pub(crate) destroy_newer: bool,
    /// End the pod that uses the volume, for its owner to make it anew, and wait for what comes of it.
    #[arg(long)]
    pub(crate) restart: bool,
    /// Don't ask.
    #[arg(short, long)]
    pub(crate) yes: bool,
    /// Take back what was asked for, as long as no pod has started with it.
    #[arg(long, conflicts_with_all = ["destroy_newer", "restart"])]
    pub(crate) cancel: bool,
    /// How long to wait with --restart, such as 90s, 30m, 12h.
    #[arg(long, default_value = "5m", value_parser = duration)]
    pub(crate) timeout: Duration,
    #[command(flatten)]
    pub(crate) helper: HelperOptions,
}

impl Rollback {
    /// The volume and the snapshot that are meant.
    pub(crate) fn meant(&self) -> Result<(Named, SnapshotName), Failure> {
        let missing = || Failure::usage("no snapshot is named", "write PVC@NAME, or --volume ID NAME");
        let what = self.what.as_deref().ok_or_else(missing)?;
        let (claim, name) = match what.split_once('@') {
            Some((claim, name)) => (Some(claim).filter(|claim| !claim.is_empty()), name),
            None if self.id.is_some() => (None, what),
            None => return Err(missing()),
        };
        let target = Target { claim: claim.map(str::to_owned), id: self.id };
        let name = name.parse().map_err(|error: zpod_admin::ParseTokenError| Failure::usage(error.to_string(), ""))?;
        Ok((target.named()?, name))
    }

    /// The volume that is meant where there is no snapshot to name.
    pub(crate) fn whole(&self) -> Result<Named, Failure> {
        if self.what.as_ref().is_some_and(|what| what.contains('@')) {
            return Err(Failure::usage("--cancel takes back whatever was asked for last", "name the claim alone"));
        }
        Target { claim: self.what.clone(), id: self.id }.named()
    }
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Adopt {
    /// Names of ZfsVolumes and ZfsSnapshots that were deleted by hand. All of them, if none is given.
    #[arg(value_name = "ID")]
    pub(crate) ids: Vec<String>,
    /// The file that the records are written into before anything is changed. It must not exist. Named after the time, if it is
    /// not given.
    #[arg(long)]
    pub(crate) file: Option<PathBuf>,
    /// Make what this file has and the cluster has not: after a call that was cut short, or when the definitions are there
    /// again.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ids", "file"])]
    pub(crate) from: Option<PathBuf>,
    /// How long to wait for each step, such as 90s, 30m, 12h.
    #[arg(long, default_value = "60s", value_parser = duration)]
    pub(crate) timeout: Duration,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Doctor {
    /// A node. All of them, if it is not given.
    pub(crate) node: Option<String>,
    /// Show what is right, too.
    #[arg(long)]
    pub(crate) all: bool,
}

impl PropsGet {
    /// The volume and the keys that are meant.
    pub(crate) fn meant(&self) -> Result<(Named, Vec<String>), Failure> {
        let (named, first) = self.target.and_more()?;
        Ok((named, first.into_iter().chain(self.keys.clone()).collect()))
    }
}

impl PropsSet {
    /// The volume and the changes that are meant.
    pub(crate) fn meant(&self) -> Result<(Named, Vec<(String, String)>), Failure> {
        let (named, first) = self.target.and_more()?;
        let first = first.map(|text| pair(&text)).transpose();
        let first = first.map_err(|what| Failure::usage(what, "after --volume and its id come the changes"))?;
        let changes: Vec<_> = first.into_iter().chain(self.changes.clone()).collect();
        if changes.is_empty() {
            return Err(Failure::usage("no change is given", "write key=value, such as compression=zstd"));
        }
        Ok((named, changes))
    }
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
    #[command(flatten)]
    pub(crate) target: Target,
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
    /// Destroy this send point, and send nothing: its space is free again, and no stream can be sent from it on. More than
    /// once for more of them.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["list", "from", "snapshot", "resume"])]
    pub(crate) remove: Vec<SendName>,
    #[command(flatten)]
    pub(crate) helper: HelperOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Receive {
    // Bound or not; what is in it is replaced.
    #[command(flatten)]
    pub(crate) target: Target,
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
            "snapshot data-db-0",
            "snapshot data-db-0 before-upgrade",
            "snapshots data-db-0",
            "snapshots data-db-0 --remove before-upgrade --remove zpod-auto-hourly-20261130T120000Z",
            "rollback data-db-0@before-upgrade",
            "rollback data-db-0@before-upgrade --destroy-newer --restart --yes --timeout 90s",
            "rollback --volume 2d0f3c1e-8f5a-5d2a-9c4b-0123456789ab before-upgrade",
            "rollback data-db-0 --cancel",
            "doctor n1 --all",
            "send data-db-0 --from monday --snapshot tuesday",
            "send data-db-0 --resume 1-ab-cd",
            "receive copy --resume",
            "receive --volume 2d0f3c1e-8f5a-5d2a-9c4b-0123456789ab",
            "receive copy --token",
            "send 2d0f3c1e-8f5a-5d2a-9c4b-0123456789ab --admin-endpoint unix:///run/zpod/admin.sock",
        ] {
            parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn a_snapshot_that_can_not_have_its_name_is_refused_before_anybody_is_asked() {
        for (line, name) in [("snapshot db zpod-mine", "zpod-mine"), ("snapshot db a@b", "a@b")] {
            let Command::Snapshot(options) = parse(line).unwrap().command else { panic!("{line}") };
            let failure = options.meant().unwrap_err();
            assert_eq!(failure.kind, crate::Kind::Usage);
            assert!(failure.to_string().contains(name) && failure.to_string().contains("are allowed"), "{failure}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_before_anything_is_asked() {
        for line in [
            "",
            "status db -A",
            "status -A --volume 2d0f3c1e-8f5a-5d2a-9c4b-0123456789ab",
            "send --volume db",
            "props set db compression",
            "props set db =zstd",
            "scrub db --timeout soon",
            "send db --from a@b",
            "send db --resume 1-ab --from monday",
            "send db --list --snapshot x",
            "rollback data-db-0 --cancel --restart",
            "top --interval 0",
            "doctor -o yaml",
            "status --admin-endpoint run/admin.sock",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn what_is_given_without_a_flag_is_a_claim_even_if_it_looks_like_an_id() {
        let id = "2d0f3c1e-8f5a-5d2a-9c4b-0123456789ab";
        let set = |line: &str| match parse(line).unwrap().command {
            Command::Props(Props::Set(set)) => set.meant(),
            other => panic!("{other:?}"),
        };
        let change = vec![("atime".to_owned(), "off".to_owned())];
        let claim = set(&format!("props set {id} atime=off")).unwrap();
        assert_eq!(claim, (Named::Claim(id.into()), change.clone()));
        let volume = set(&format!("props set --volume {id} atime=off")).unwrap();
        assert_eq!(volume, (Named::Id(id.parse().unwrap()), change));
        for line in ["props set db", &format!("props set --volume {id}"), &format!("props set --volume {id} db a=b")] {
            assert!(set(line).is_err(), "{line}");
        }
        let both = parse(&format!("send db --volume {id}")).unwrap();
        let Command::Send(both) = both.command else { panic!() };
        assert!(both.target.named().unwrap_err().to_string().contains("only one"));
        let Command::Scrub(none) = parse("scrub").unwrap().command else { panic!() };
        assert_eq!(none.target.named().unwrap_err().kind, crate::Kind::Usage);
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
