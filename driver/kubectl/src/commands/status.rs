use serde::Serialize;

use crate::Failure;
use crate::cluster::Cluster;
use crate::options::{Format, Sort, Status};
use crate::output::show;
use crate::text::{draw, or_dash, size, table};
use crate::view::{VolumeView, sort, tree_of};

/// The JSON of `status` and `top`.
#[derive(Debug, Serialize)]
pub(super) struct Volumes {
    pub(super) volumes: Vec<VolumeView>,
}

pub(super) async fn run(cluster: &Cluster, options: &Status, format: Format) -> Result<(), Failure> {
    let shown = match options.target.maybe()? {
        Some(named) => vec![cluster.volume(&named).await?],
        None => cluster.all_volumes(options.all_namespaces).await?,
    };
    let snapshots = cluster.all_snapshots().await?;
    let mut volumes: Vec<_> = shown.iter().map(|object| VolumeView::new(object, &snapshots)).collect();
    volumes.sort_by_cached_key(|view| (view.namespace.clone(), view.name().to_owned()));
    if volumes.is_empty() && format == Format::Table {
        return Err(nothing(cluster, options.all_namespaces));
    }
    if options.tree && format == Format::Table {
        let all = cluster.all_volumes(true).await?;
        return crate::output::write(&draw(&tree_of(&shown, &all, &snapshots)));
    }
    let found = Volumes { volumes };
    show(format, &found, || text(&found.volumes))
}

/// There are none, which is worth a word and no failure of anything.
pub(super) fn nothing(cluster: &Cluster, everywhere: bool) -> Failure {
    if everywhere {
        Failure::not_found("there are no volumes in this cluster", "a claim of a zpod StorageClass and a pod make one")
    } else {
        let what = format!("no claim in namespace {} has a volume", cluster.namespace);
        Failure::not_found(what, "-n chooses another namespace, -A shows all")
    }
}

pub(super) fn text(volumes: &[VolumeView]) -> String {
    let header = ["NAMESPACE", "CLAIM", "NODE", "POD", "CAPACITY", "USED", "RATIO", "HEALTH", "SNAPSHOTS", "MESSAGE"];
    table(
        &header,
        volumes.iter().map(|view| {
            vec![
                or_dash(&view.namespace),
                view.name().to_owned(),
                view.node.clone(),
                or_dash(&view.pod),
                size(view.capacity_bytes),
                view.used_bytes.map_or_else(|| "-".into(), size),
                or_dash(&view.compress_ratio),
                view.state().to_owned(),
                view.snapshots.to_string(),
                view.said(),
            ]
        }),
    )
}

/// The rows of `top`.
pub(super) fn top_text(volumes: &mut [VolumeView], by: Sort) -> String {
    sort(volumes, by);
    let header = [
        "NAMESPACE",
        "CLAIM",
        "NODE",
        "USED",
        "CAPACITY",
        "FULL",
        "ALLOCATED",
        "RATIO",
        "READ",
        "WRITE",
        "CHECKSUM",
        "DATA",
        "HEALTH",
    ];
    table(
        &header,
        volumes.iter().map(|view| {
            let errors = view.errors;
            vec![
                or_dash(&view.namespace),
                view.name().to_owned(),
                view.node.clone(),
                view.used_bytes.map_or_else(|| "-".into(), size),
                size(view.capacity_bytes),
                view.percent().map_or_else(|| "-".into(), |percent| format!("{percent:.0}%")),
                view.allocated_bytes.map_or_else(|| "-".into(), size),
                or_dash(&view.compress_ratio),
                errors.read.to_string(),
                errors.write.to_string(),
                errors.checksum.to_string(),
                errors.data.to_string(),
                view.state().to_owned(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn view(claim: &str, health: &str, checksum: i64) -> VolumeView {
        let object = serde_json::from_value(json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolume", "metadata": {"name": "id"},
            "spec": {
                "volumeName": "pvc-1", "nodeName": "n1", "capacity": "10Gi",
                "parameters": {"backing": "file", "provisioning": "thin", "headroom": "8x", "quota": "refquota"},
                "claim": {"namespace": "prod", "name": claim},
            },
            "status": {"phase": "Ready", "pool": {
                "name": "zpod-0123456789ab", "health": health, "used": "1536Mi", "allocated": "2Gi",
                "compressRatio": "1.43x", "checksumErrors": checksum,
            }},
        }));
        VolumeView::new(&object.unwrap(), &[])
    }

    #[test]
    fn a_table_has_a_line_for_each_volume_and_dashes_for_what_is_not_known() {
        let mut unclaimed = view("", "", 0);
        (unclaimed.namespace, unclaimed.used_bytes) = (String::new(), None);
        let text = text(&[view("db", "Online", 0), unclaimed]);
        let want = "\
NAMESPACE   CLAIM   NODE   POD   CAPACITY   USED    RATIO   HEALTH   SNAPSHOTS   MESSAGE
prod        db      n1     -     10Gi       1.5Gi   1.43x   Online   0
-           id      n1     -     10Gi       -       1.43x   Ready    0
";
        assert_eq!(text, want, "\n{text}");
    }

    #[test]
    fn top_puts_what_needs_a_look_first() {
        let text = top_text(&mut [view("fine", "Online", 0), view("broken", "Degraded", 7)], Sort::Errors);
        let want = "\
NAMESPACE   CLAIM    NODE   USED    CAPACITY   FULL   ALLOCATED   RATIO   READ   WRITE   CHECKSUM   DATA   HEALTH
prod        broken   n1     1.5Gi   10Gi       15%    2Gi         1.43x   0      0       7          0      Degraded
prod        fine     n1     1.5Gi   10Gi       15%    2Gi         1.43x   0      0       0          0      Online
";
        assert_eq!(text, want, "\n{text}");
    }

    #[test]
    fn the_json_of_a_volume_has_the_documented_shape() {
        let json = serde_json::to_value(Volumes { volumes: vec![view("db", "Online", 7)] }).unwrap();
        let want = json!({"volumes": [{
            "volume": "id", "namespace": "prod", "claim": "db", "node": "n1", "pod": "", "phase": "Ready",
            "mode": "Filesystem", "capacityBytes": 10u64 << 30, "usedBytes": 1536u64 << 20,
            "allocatedBytes": 2u64 << 30, "compressRatio": "1.43x", "health": "Online", "message": "",
            "pool": "zpod-0123456789ab", "dataset": "zpod-0123456789ab/data",
            "errors": {"read": 0, "write": 0, "checksum": 7, "data": 0}, "snapshots": 0, "attributes": {},
        }]});
        assert_eq!(json, want);
    }
}
