use futures_util::{StreamExt as _, stream};
use kube::Api;
use kube::api::ListParams;
use serde::Serialize;
use zpod_admin::{Check, Level};
use zpod_kubernetes::READY;
use zpod_kubernetes::crd::ZfsNode;

use crate::admin::{Admin, Line};
use crate::cluster::Cluster;
use crate::options::{Doctor, Format};
use crate::output::show;
use crate::text::one_line;
use crate::{Failure, Kind};

/// Nodes that are looked at at the same time.
const AT_ONCE: usize = 8;

#[derive(Debug, Serialize)]
struct Found {
    nodes: Vec<NodeView>,
}

#[derive(Debug, Serialize)]
struct NodeView {
    node: String,
    checks: Vec<Check>,
}

pub(super) async fn run(cluster: &Cluster, options: &Doctor, format: Format) -> Result<(), Failure> {
    let nodes: Api<ZfsNode> = Api::all(cluster.client.clone());
    let api = |error| Failure::api("ZfsNodes", &error);
    let nodes = match &options.node {
        Some(name) => match nodes.get_opt(name).await.map_err(api)? {
            Some(node) => vec![node],
            None => {
                let remedy = "zpod-node makes its ZfsNode when it starts: `kubectl get zfsnodes` lists those there are";
                return Err(Failure::not_found(format!("there is no ZfsNode {name}"), remedy));
            }
        },
        None => nodes.list(&ListParams::default()).await.map_err(api)?.items,
    };
    if nodes.is_empty() {
        return Err(Failure::not_found(
            "there are no ZfsNodes: zpod-node has never run on any node",
            "see the DaemonSet zpod-node, its node selector and tolerations",
        ));
    }
    let views = stream::iter(nodes).map(|node| look(cluster, node)).buffered(AT_ONCE).collect().await;
    report(views, options.all, format)
}

/// The one node of `zpod --standalone`.
pub(super) async fn of_socket(admin: &Admin, options: &Doctor, format: Format) -> Result<(), Failure> {
    let node = options.node.clone().unwrap_or_else(|| "this one".into());
    report(vec![NodeView { node, checks: admin.doctor().await? }], options.all, format)
}

async fn look(cluster: &Cluster, node: ZfsNode) -> NodeView {
    let name = node.metadata.name.clone().unwrap_or_default();
    let mut checks = vec![ready(&node)];
    let seen = async { Admin::new(Line::to_node(cluster, &name).await?).doctor().await };
    match seen.await {
        Ok(more) => checks.extend(more),
        Err(failure) => {
            let text = one_line(failure.to_string().trim());
            checks.push(Check::fail(
                "zpod-node",
                format!("can't be asked: {text}"),
                "the rest of the node was not looked at",
            ));
        }
    }
    NodeView { node: name, checks }
}

fn ready(node: &ZfsNode) -> Check {
    let status = node.status.clone().unwrap_or_default();
    match status.conditions.iter().find(|condition| condition.type_ == READY) {
        Some(condition) if condition.status == "True" => Check::ok("ready", condition.message.clone()),
        Some(condition) => {
            Check::fail("ready", condition.message.clone(), "no volumes are made there until this is mended")
        }
        None => Check::fail("ready", "zpod-node has never said how its devices are", "see the log of its pod"),
    }
}

fn report(nodes: Vec<NodeView>, all: bool, format: Format) -> Result<(), Failure> {
    let broken = nodes.iter().flat_map(|node| &node.checks).any(|check| check.level == Level::Fail);
    let found = Found { nodes };
    show(format, &found, || text(&found.nodes, all))?;
    if broken { Err(Failure::new(Kind::Findings, "", "")) } else { Ok(()) }
}

fn text(nodes: &[NodeView], all: bool) -> String {
    let mut text = String::new();
    for NodeView { node, checks } in nodes {
        let count = |level| checks.iter().filter(|check| check.level == level).count();
        let (failed, warned) = (count(Level::Fail), count(Level::Warn));
        let summary = match (failed, warned) {
            (0, 0) => format!("all {} checks are well", checks.len()),
            _ => format!("{failed} failed, {warned} warnings, {} well", count(Level::Ok)),
        };
        text.push_str(&format!("node {node}: {summary}\n"));
        let mut shown: Vec<_> = checks.iter().filter(|check| all || check.level != Level::Ok).collect();
        shown.sort_by_key(|check| std::cmp::Reverse(check.level));
        for check in shown {
            let level = match check.level {
                Level::Ok => "ok  ",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            text.push_str(&format!("  {level}  {}: {}\n", one_line(&check.name), one_line(&check.message)));
            if !check.remedy.is_empty() {
                text.push_str(&format!("        remedy: {}\n", one_line(&check.remedy)));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes() -> Vec<NodeView> {
        let checks = vec![
            Check::ok("kvm", "works"),
            Check::warn("backing-quotas", "none", "use prjquota"),
            Check::fail("guest-image", "initrd is\nmissing", "see the log"),
        ];
        vec![
            NodeView { node: "n1".into(), checks },
            NodeView { node: "n2".into(), checks: vec![Check::ok("kvm", "works")] },
        ]
    }

    #[test]
    fn what_is_worst_comes_first_and_what_is_well_is_counted() {
        let want = "\
node n1: 1 failed, 1 warnings, 1 well
  FAIL  guest-image: initrd is missing
        remedy: see the log
  warn  backing-quotas: none
        remedy: use prjquota
node n2: all 1 checks are well
";
        assert_eq!(text(&nodes(), false), want);
        assert!(text(&nodes(), true).contains("  ok    kvm: works\n"));
    }

    #[test]
    fn something_broken_is_an_exit_code_of_its_own() {
        assert_eq!(report(nodes(), false, Format::Json).unwrap_err().kind.code(), 4);
        assert!(report(nodes().split_off(1), false, Format::Json).is_ok());
    }
}
