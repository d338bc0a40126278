//! Encrypted volumes: what opens them, and what of them is never to be found.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::{Instant, sleep};
use tonic::transport::Channel;
use tonic::{Code, Status};
use zpod_e2e::secrets::{holds, must_not_be_found};
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, PATIENCE, Sandbox};
use zpod_proto::guest::guest_client::GuestClient;
use zpod_proto::guest::{Health, MarkRequest, ProvideKeyRequest, StatusRequest};
use zpod_volume::{Bytes, Encryption, Mark, SnapshotId};

use crate::disk::pod;
use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);

type Control = GuestClient<Channel>;

async fn provide(control: &mut Control, image: &Image, key: &[u8], previous: &[u8]) -> Result<bool, Status> {
    let (volume_id, token) = (image.id(), image.spec.token.to_string());
    let request = ProvideKeyRequest { volume_id, token, key: key.to_vec(), previous_key: previous.to_vec() };
    Ok(control.provide_key(request).await?.into_inner().changed)
}

/// Waits until the guest says that the volume waits for its key.
async fn awaited(control: &mut Control, image: &Image) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let volumes = control.status(StatusRequest {}).await?.into_inner().volumes;
        if let Some(told) = volumes.iter().find(|told| told.volume_id == image.id() && told.awaits_key) {
            ensure!(told.encrypted && told.token == image.spec.token.to_string(), "{told:?}");
            ensure!(told.health() == Health::Unavail && !told.message.is_empty(), "{told:?}");
            return Ok(());
        }
        ensure!(Instant::now() < end, "no volume waits for its key: {volumes:?}");
        sleep(Duration::from_millis(100)).await;
    }
}

/// Starts a container whose volume waits for its key, and gives it then.
async fn run_with(pod: &mut Sandbox, container: Container, image: &Image, key: &[u8]) -> Result<Result<bool, Status>> {
    let mut control = pod.control().await?;
    let give = async {
        awaited(&mut control, image).await?;
        anyhow::Ok(provide(&mut control, image, key, b"").await)
    };
    let (ran, given) = tokio::join!(pod.run(container), give);
    let given = given?;
    ran.map(|()| given.clone()).or_else(|error| match &given {
        // Both are told the same.
        Err(status) => {
            let text = format!("{error:#}");
            ensure!(text.contains(status.message()), "{text:?} is not {status}");
            Ok(given)
        }
        Ok(_) => Err(error),
    })
}

#[tokio::test]
async fn an_encrypted_volume_opens_with_its_key_only_and_neither_key_nor_contents_are_found_outside() -> Result<()> {
    let dir = Workdir::new()?;
    // Made at random, so that they stand in no file of this test either.
    let random = || uuid::Uuid::new_v4().simple().to_string();
    let (hex, passphrase) = (format!("{}{}", random(), random()), format!("correct horse {}", random()));
    // As many bytes as a key has are one as they are.
    let raw = random();
    let text = format!("plaintext-{}", random());
    let write = format!("yes {text} | head -c 1000000");

    let mut image = Image::new(&dir, "pvc-secret", SIZE)?;
    image.spec.encryption = Some(Encryption::Aes256Gcm);
    // What is compressed could not be found again.
    image.spec.dataset_properties = [("compression".into(), "off".into())].into();
    image.publish()?;
    let mut plain = Image::new(&dir, "pvc-plain", SIZE)?;
    plain.spec.dataset_properties.clone_from(&image.spec.dataset_properties);
    plain.publish()?;

    let mut first = pod(&dir).await?;
    first.run(Container::debug("tools")).await?;
    let app = |image: &Image| Container::new("app", [image.mount("/data")]);
    assert!(!run_with(&mut first, app(&image), &image, hex.as_bytes()).await??);
    println!("CreateContainer of a new encrypted volume took {:?}", first.create_time);
    let get = format!("zfs get -H -p -o value encryption,keyformat,keystatus,keylocation {}", image.spec.dataset());
    assert_eq!(first.zfs_tool("tools", &get).await?, "aes-256-gcm\nhex\navailable\nprompt");
    first.sh("app", &format!("{write} > /data/file; sync")).await?;
    first.run(Container::new("plain", [plain.mount("/data")])).await?;
    first.sh("plain", &format!("{write} > /data/file; sync")).await?;
    let mut control = first.control().await?;
    control.sync(zpod_proto::guest::SyncRequest { volume_id: plain.id() }).await?;
    assert!(holds(&plain.file, text.as_bytes())?, "the search finds nothing");
    let other = provide(&mut control, &plain, hex.as_bytes(), b"").await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition, "{other}");

    // The key is changed, by who knows the one before, and only once.
    assert!(!provide(&mut control, &image, hex.as_bytes(), b"").await?);
    let refused = provide(&mut control, &image, passphrase.as_bytes(), b"").await.unwrap_err();
    println!("another key: {refused}");
    assert_eq!(refused.code(), Code::PermissionDenied);
    let begin = Instant::now();
    assert!(provide(&mut control, &image, passphrase.as_bytes(), hex.as_bytes()).await?);
    println!("changed the key in {:?}", begin.elapsed());
    assert!(!provide(&mut control, &image, passphrase.as_bytes(), hex.as_bytes()).await?);
    assert!(first.zfs_tool("tools", &get).await?.contains("\npassphrase\n"));

    // Who has ZFS in its container may say that the key is elsewhere. It is the node's all the same, also in copies.
    first.zfs_tool("tools", &format!("zfs set keylocation=file:///etc/passwd {}", image.spec.dataset())).await?;
    let mark = Mark::for_snapshot(SnapshotId::from_name("s"));
    control.mark(MarkRequest { volume_id: image.id(), mark: mark.to_string() }).await?;
    first.sh("app", "touch /data/later; sync").await?;
    let copy = image.copy(&dir, "pvc-copy", Bytes::mib(400), Some(mark.clone()))?;
    // A container that starts again needs no new key.
    first.remove("app").await?;
    first.run(app(&image)).await?;
    let secrets = [hex.as_bytes(), passphrase.as_bytes(), raw.as_bytes()];
    let guest_dir = first.guest().vsock().parent().context("a socket without a directory")?.to_owned();
    must_not_be_found(&secrets, &[dir.path(), &guest_dir])?;
    assert!(!holds(&image.file, text.as_bytes())? && !holds(&copy.file, text.as_bytes())?);
    let inside = "cat /guest/proc/[0-9]*/cmdline /guest/proc/[0-9]*/environ 2>/dev/null | tr '\\0' '\\n'; dmesg";
    let inside = first.sh("tools", inside).await?;
    assert!(!inside.contains(&hex) && !inside.contains(&passphrase));
    first.kill();

    image.publish_again()?;
    let mut second = pod(&dir).await?;
    second.run(Container::debug("tools")).await?;
    let wrong = run_with(&mut second, app(&image), &image, hex.as_bytes()).await?.unwrap_err();
    println!("a wrong key: {wrong}");
    assert!(wrong.code() == Code::PermissionDenied && wrong.message().contains(&image.id()), "{wrong}");
    run_with(&mut second, app(&image), &image, passphrase.as_bytes()).await??;
    println!("CreateContainer with a key from a passphrase took {:?}", second.create_time);
    assert_eq!(second.sh("app", &format!("ls /data; {write} | cmp - /data/file")).await?, "file\nlater");

    // The clone opens with what was the key when it was taken, and gets another one at once.
    let mut control = second.control().await?;
    provide(&mut control, &copy, raw.as_bytes(), passphrase.as_bytes()).await?;
    second.run(Container::new("copy", [copy.mount("/data")])).await?;
    assert_eq!(second.sh("copy", &format!("ls /data; {write} | cmp - /data/file")).await?, "file");
    assert!(!provide(&mut control, &copy, raw.as_bytes(), b"").await?);
    let get = format!("zfs get -H -p -o value encryption,keyformat {}", copy.spec.dataset());
    assert_eq!(second.zfs_tool("tools", &get).await?, "aes-256-gcm\nraw");

    // Against its spec.
    second.remove("copy").await?;
    let mut open = copy;
    open.spec.encryption = None;
    open.publish()?;
    let error = format!("{:#}", second.run(Container::new("open", [open.mount("/data")])).await.unwrap_err());
    println!("against its spec: {error}");
    assert!(error.contains("encryption=aes-256-gcm"), "{error}");

    let guest_dir = second.guest().vsock().parent().context("a socket without a directory")?.to_owned();
    must_not_be_found(&secrets, &[dir.path(), &guest_dir])?;
    assert!(!holds(&image.file, text.as_bytes())? && !holds(&open.file, text.as_bytes())?);
    second.stop().await
}
