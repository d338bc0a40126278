//! The node of the tests, without a kubelet: what its containers get must be what a container runtime gives them, or
//! the tests of the chart prove nothing.

mod pod;

use std::time::{Duration, Instant};

use anyhow::Result;
use zpod_e2e::cri::api::MountPropagation::{
    self, PropagationBidirectional as Both, PropagationHostToContainer as Down, PropagationPrivate as Private,
};
use zpod_e2e::cri::api::{Capability, Int64Value, LinuxContainerSecurityContext, Mount};

use pod::{Pod, sleeper};

const TREE: &str = "/var/lib/kubelet";

fn privileged() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext { privileged: true, ..Default::default() }
}

fn tree(propagation: MountPropagation) -> Mount {
    let (host_path, container_path) = (TREE.to_owned(), "/tree".to_owned());
    Mount { host_path, container_path, propagation: propagation.into(), ..Default::default() }
}

#[tokio::test]
async fn a_mount_travels_as_far_as_its_propagation_says_and_stays_when_its_maker_ends() -> Result<()> {
    let mut pod = Pod::start().await?;
    let both = pod.run(sleeper("both", [tree(Both)], privileged())).await?;
    let down = pod.run(sleeper("down", [tree(Down)], privileged())).await?;
    let private = pod.run(sleeper("private", [tree(Private)], privileged())).await?;
    let list = "ls /tree/volume || true";

    pod.sh(&both, "mkdir /tree/volume && mount -t tmpfs zpod /tree/volume && touch /tree/volume/file").await?;
    assert_eq!(pod.sh(&down, list).await?, "file");
    assert_eq!(pod.sh(&private, list).await?, "");
    // What it mounts itself goes nowhere.
    pod.sh(&down, "mkdir /tree/own && mount -t tmpfs zpod /tree/own && touch /tree/own/file").await?;
    assert_eq!(pod.sh(&both, "ls /tree/own").await?, "");

    // The node has it: a new container gets it, and it outlives its maker.
    pod.remove(&both).await?;
    let later = pod.run(sleeper("later", [tree(Both)], privileged())).await?;
    assert_eq!(pod.sh(&later, list).await?, "file");
    assert_eq!(pod.sh(&down, list).await?, "file");
    pod.sh(&later, "umount /tree/volume").await?;
    assert_eq!(pod.sh(&down, list).await?, "");

    // Only a shared mount has propagation to offer.
    let elsewhere = Mount { host_path: "/usr".to_owned(), ..tree(Both) };
    let refused = pod.run(sleeper("elsewhere", [elsewhere], privileged())).await.unwrap_err().to_string();
    assert!(refused.contains("not a shared mount"), "{refused}");
    Ok(())
}

#[tokio::test]
async fn a_container_may_do_what_its_security_context_grants_and_no_more() -> Result<()> {
    let mut pod = Pod::start().await?;
    let bounding = "grep CapBnd /proc/self/status | cut -f2";
    let capabilities = |add: &[&str]| {
        let add_capabilities = add.iter().map(|&name| name.to_owned()).collect();
        let drop_capabilities = vec!["ALL".to_owned()];
        Some(Capability { add_capabilities, drop_capabilities, ..Default::default() })
    };

    let strict = LinuxContainerSecurityContext {
        capabilities: capabilities(&[]),
        run_as_user: Some(Int64Value { value: 1000 }),
        run_as_group: Some(Int64Value { value: 1001 }),
        supplemental_groups: vec![2000],
        readonly_rootfs: true,
        no_new_privs: true,
        ..Default::default()
    };
    let strict = pod.run(sleeper("strict", [], strict)).await?;
    assert_eq!(pod.sh(&strict, "id -u; id -g; id -G").await?, "1000\n1001\n1001 2000");
    assert_eq!(pod.sh(&strict, bounding).await?, "0000000000000000");
    assert_eq!(pod.sh(&strict, "grep -c 'NoNewPrivs:.1' /proc/self/status").await?, "1");
    assert!(pod.sh(&strict, "touch /file").await.unwrap_err().to_string().contains("Read-only file system"));
    // Its own processes and no others, a writable /dev/shm, no devices of the machine.
    assert_eq!(
        pod.sh(&strict, "touch /dev/shm/x; ls /proc | grep -c '^1$'; ls /dev | grep -c vda || true").await?,
        "1\n0"
    );

    let one = LinuxContainerSecurityContext { capabilities: capabilities(&["SYS_ADMIN"]), ..Default::default() };
    let one = pod.run(sleeper("one", [], one)).await?;
    assert_eq!(pod.sh(&one, bounding).await?, "0000000000200000");
    pod.sh(&one, "mount -t tmpfs t /mnt").await?;
    assert!(pod.sh(&one, "chown 1 /bin/busybox").await.is_err(), "CAP_CHOWN was dropped");

    let usual = pod.run(sleeper("usual", [], LinuxContainerSecurityContext::default())).await?;
    assert_eq!(pod.sh(&usual, bounding).await?, "00000000a80425fb");
    assert!(pod.sh(&usual, "mount -t tmpfs t /mnt").await.is_err(), "nobody granted CAP_SYS_ADMIN");
    Ok(())
}

#[tokio::test]
async fn a_container_ends_with_its_code_after_sigterm_or_sigkill_and_its_log_is_whole() -> Result<()> {
    let mut pod = Pod::start().await?;
    let script = |script: &str| {
        let mut config = sleeper(&script[..4], [], LinuxContainerSecurityContext::default());
        config.command = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        config
    };
    let polite = pod.run(script("trap 'echo bye; exit 7' TERM; echo hello; while true; do sleep 0.1; done")).await?;
    while pod.log("trap").unwrap_or_default().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(pod.stop(&polite, 20).await?, 7);
    let log = pod.log("trap")?;
    let texts: Vec<_> = log.lines().filter_map(|line| line.split_once(' ')).map(|(_, text)| text).collect();
    assert_eq!(texts, ["stdout F hello", "stdout F bye"]);

    // The first process of a PID namespace takes no signal that it has no handler for.
    let deaf = pod.run(script("sleep 100000")).await?;
    let begin = Instant::now();
    assert_eq!(pod.stop(&deaf, 1).await?, 137);
    assert!(begin.elapsed() >= Duration::from_secs(1), "it had no second to end in");

    let mut missing = script("true");
    missing.command = vec!["/no/such/program".to_owned()];
    let error = pod.run(missing).await.unwrap_err().to_string();
    assert!(error.contains("/no/such/program"), "{error}");
    Ok(())
}
