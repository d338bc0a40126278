//! A guest without zpod-guest.

use std::fs;

use anyhow::Result;
use zpod_e2e::shim::User;
use zpod_e2e::{Boot, Container, Mount, Node, Runtime, Sandbox, direct_volume};

/// ZFS is loaded, the agent runs, only zpod-guest is missing: a node whose RuntimeClass has our kernel and not our
/// command line. The agent then hands fstype zfs and a device to mount(2), which wants a dataset's name.
#[tokio::test]
async fn a_guest_without_zpod_guest_refuses_the_volume_and_runs_everything_else() -> Result<()> {
    let node = Node::idle()?;
    let target = node.target("pod", "pv")?;
    fs::create_dir(&target)?;
    let disk = node.backing_dir().join("disk");
    fs::File::create(&disk)?.set_len(64 << 20)?;
    let entry = direct_volume::entry(&node.direct_volume_dir(), &target);
    fs::create_dir_all(&entry)?;
    let info =
        serde_json::json!({"volume-type": "directvol", "device": disk, "fstype": "zfs", "options": ["zpod=e30"]});
    fs::write(entry.join("mountInfo.json"), info.to_string())?;

    for runtime in [Runtime::Rs, Runtime::Go] {
        let mut pod = Sandbox::start_with(&node, runtime, Boot::Bare).await?;
        println!("{runtime:?}: the agent answered {:?} after power-on", pod.boot_time);
        pod.run(Container::new("plain", [])).await?;
        assert_eq!(pod.sh("plain", "echo $((6*7)); cat /proc/filesystems | grep -c zfs").await?, "42\n1");
        assert_eq!(pod.sh_as("plain", User { uid: 1000, group: Some(2000) }, "id -u; id -G").await?, "1000\n1000 2000");
        assert!(pod.sh("plain", "echo no >&2; exit 3").await.unwrap_err().root_cause().to_string().contains("3: no"));

        for _ in 0..2 {
            let refused = pod.run(Container::new("with-volume", [Mount::new(&target, "/data")])).await;
            let error = format!("{:#}", refused.expect_err("the container must not start"));
            assert!(error.contains("failed to mount"), "{error}");
        }
        assert_eq!(fs::read(&disk)?.iter().filter(|byte| **byte != 0).count(), 0, "the disk was written to");
        pod.stop().await?;
    }
    Ok(())
}
