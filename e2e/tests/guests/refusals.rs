//! What a guest must not do with a disk.

use anyhow::Result;
use zpod_e2e::csi::Publish;
use zpod_e2e::node::{blank_copy, ever_written};
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox};
use zpod_volume::Bytes;

const SIZE: Bytes = Bytes::mib(256);

#[tokio::test]
async fn a_wrong_disk_and_a_blank_one_in_the_place_of_data_are_refused_and_left_alone() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-mine", SIZE, &[]).await?;
    let other = node.csi.create("pvc-other", SIZE, &[]).await?;
    let (target, other_target) = (node.target("one", "mine")?, node.target("other", "other")?);
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    node.csi.publish(&other, &other_target, &Publish::default()).await?;
    let (disk, other_disk) = (node.device(&target)?, node.device(&other_target)?);

    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.substitute(&disk, &other_disk);
    let container = || Container::new("app", [Mount::new(&target, "/data")]);
    let error = format!("{:#}", pod.run(container()).await.expect_err("the container must not start"));
    println!("wrong disk: {error}");
    for wanted in [&volume.volume_id, &other.volume_id] {
        assert!(error.contains(wanted.as_str()), "{wanted} is not in: {error}");
    }
    assert!(!ever_written(&other_disk)? && !ever_written(&disk)?, "a refused disk was written to");

    // The right one; its data; and the volume is known to hold some from here on.
    pod.substitute(&disk, &disk);
    pod.run(container()).await?;
    pod.sh("app", "echo precious > /data/file").await?;
    pod.remove("app").await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;

    let blank = node.dir().join("blank");
    blank_copy(&disk, &blank)?;
    pod.substitute(&disk, &blank);
    let error = format!("{:#}", pod.run(container()).await.expect_err("the container must not start"));
    println!("blank disk: {error}");
    assert!(error.contains(&volume.volume_id), "{error}");
    assert!(!ever_written(&blank)?, "the blank disk was formatted");

    pod.substitute(&disk, &disk);
    pod.run(container()).await?;
    assert_eq!(pod.sh("app", "cat /data/file").await?, "precious");
    pod.stop().await?;
    for (volume, target) in [(&volume, &target), (&other, &other_target)] {
        node.csi.unpublish(volume, target).await?;
        node.csi.delete(volume).await?;
    }
    node.must_be_empty()
}
