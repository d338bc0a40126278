//! `kubectl zpod` and the admin endpoint of a machine without a cluster, with real guests.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::process::Command;
use zpod_e2e::csi::Publish;
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox, inputs};
use zpod_proto::csi::Volume;
use zpod_volume::Bytes;

const SIZE: Bytes = Bytes::mib(512);
const FILES: &str = "cat /data/*.txt; sha256sum < /data/blob";

/// A volume in a guest of its own.
struct Pod {
    volume: Volume,
    target: PathBuf,
    sandbox: Sandbox,
}

async fn pod(node: &mut Node, name: &str) -> Result<Pod> {
    let volume = node.csi.create(name, SIZE, &[]).await?;
    let target = node.target(name, "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut sandbox = Sandbox::start(node, Runtime::Rs).await?;
    sandbox.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    // zpod knows a guest by what it reports.
    node.csi.stats_when(&volume, &target, |stats| stats.volume_condition.as_ref().is_some_and(|c| !c.abnormal)).await?;
    Ok(Pod { volume, target, sandbox })
}

fn plugin(node: &Node, arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(inputs::kubectl_zpod()?);
    let socket = node.dir().join("admin.sock");
    command.args(arguments).arg("--admin-endpoint").arg(format!("unix://{}", socket.display())).kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(command)
}

async fn run(command: &mut Command) -> Result<Output> {
    let output = tokio::time::timeout(PATIENCE, command.spawn()?.wait_with_output()).await??;
    print!("{}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

async fn json(node: &Node, arguments: &[&str]) -> Result<Value> {
    let output = run(plugin(node, arguments)?.args(["-o", "json"])).await?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("{arguments:?}: {output:?}"))
}

/// Until the guest is heard: zpod looks for sandboxes once a second.
async fn heard(node: &Node, id: &str) -> Result<()> {
    for _ in 0..60 {
        if run(&mut plugin(node, &["send", id, "--list", "-o", "json"])?).await?.status.success() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    anyhow::bail!("the guest of {id} is not heard: {}", node.log_tail())
}

async fn send(node: &Node, arguments: &[&str], file: &Path) -> Result<u64> {
    let output = run(plugin(node, arguments)?.stdout(File::create(file)?)).await?;
    ensure!(output.status.success(), "{arguments:?}: {}\n{}", output.status, node.log_tail());
    Ok(fs::metadata(file)?.len())
}

async fn receive(node: &Node, arguments: &[&str], file: &Path) -> Result<Output> {
    run(plugin(node, arguments)?.stdin(File::open(file)?)).await
}

#[tokio::test]
async fn a_volume_goes_to_a_file_and_into_another_also_what_has_changed_and_after_a_break() -> Result<()> {
    let mut node = Node::start().await?;
    let mut from = pod(&mut node, "pvc-from").await?;
    let mut to = pod(&mut node, "pvc-to").await?;
    let (source, copy) = (from.volume.volume_id.clone(), to.volume.volume_id.clone());
    let (source, copy) = (source.as_str(), copy.as_str());
    heard(&node, source).await?;
    heard(&node, copy).await?;

    let doctor = json(&node, &["doctor", "--all"]).await?;
    let checks = doctor["nodes"][0]["checks"].as_array().context("no checks")?;
    let of = |name: &str| checks.iter().find(|check| check["name"] == name).map(|check| &check["level"]);
    assert_eq!(of("guests"), Some(&Value::from("ok")), "{doctor:#}");
    assert_eq!(of("direct-volumes"), Some(&Value::from("ok")), "{doctor:#}");
    let live = json(&node, &["props", "get", source, "--live", "compression"]).await?;
    println!("{live}");
    assert_eq!(live["properties"][0]["source"], "dataset");

    from.sandbox_sh("echo one > /data/one.txt; e2e fill /data/blob 67108864").await?;
    let file = node.dir().join("stream");
    let bytes = send(&node, &["send", source, "--snapshot", "one"], &file).await?;
    println!("all of it: {bytes} bytes");
    assert!(bytes > 64 << 20, "{bytes}");

    // Half of it: it broke off, and goes on.
    let half = node.dir().join("half");
    let whole = fs::read(&file)?;
    fs::write(&half, whole.get(..whole.len() / 2).context("no half")?)?;
    let broken = receive(&node, &["receive", copy], &half).await?;
    assert!(!broken.status.success());
    assert_eq!(to.sandbox_sh("ls /data").await?, "", "half a stream must not be seen");
    let token = run(&mut plugin(&node, &["receive", copy, "--token"])?).await?;
    let token = String::from_utf8(token.stdout)?.trim().to_owned();
    let refused = receive(&node, &["receive", copy], &file).await?;
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--resume"), "{refused:?}");
    let rest = send(&node, &["send", source, "--resume", &token], &file).await?;
    println!("the rest: {rest} bytes");
    assert!(rest < bytes * 3 / 4, "{rest}");
    let received = receive(&node, &["receive", copy, "--resume"], &file).await?;
    assert!(received.status.success(), "{received:?}");
    assert_eq!(to.sandbox_sh(FILES).await?, from.sandbox_sh(FILES).await?);

    // What has changed since, from one process to the other.
    from.sandbox_sh("rm /data/one.txt; echo two > /data/two.txt").await?;
    let mut sender = plugin(&node, &["send", source, "--from", "one", "--snapshot", "two"])?;
    let mut sender = sender.stdout(Stdio::piped()).spawn()?;
    let pipe: Stdio = sender.stdout.take().context("no pipe")?.try_into()?;
    let received = run(plugin(&node, &["receive", copy, "-o", "json"])?.stdin(pipe)).await?;
    assert!(sender.wait().await?.success() && received.status.success(), "{received:?}");
    let received: Value = serde_json::from_slice(&received.stdout)?;
    println!("what has changed: {} bytes", received["bytes"]);
    assert_eq!(received["snapshot"], "zpod-send-two");
    assert!(received["bytes"].as_u64().is_some_and(|bytes| bytes < 4 << 20), "{received}");
    assert_eq!(to.sandbox_sh(FILES).await?, from.sandbox_sh(FILES).await?);
    let points = json(&node, &["send", copy, "--list"]).await?;
    assert_eq!(points["points"].as_array().map(Vec::len), Some(2), "{points}");

    for pod in [from, to] {
        pod.sandbox.stop().await?;
        node.csi.unpublish(&pod.volume, &pod.target).await?;
        let gone = run(&mut plugin(&node, &["send", &pod.volume.volume_id, "--list"])?).await?;
        assert!(String::from_utf8_lossy(&gone.stderr).contains("start its pod"), "{gone:?}");
        node.csi.delete(&pod.volume).await?;
    }
    node.must_be_empty()
}

impl Pod {
    async fn sandbox_sh(&mut self, script: &str) -> Result<String> {
        self.sandbox.sh("app", script).await
    }
}
