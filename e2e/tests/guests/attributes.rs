//! What of a volume changes while it is in use.

use std::collections::HashMap;

use anyhow::Result;
use tonic::Code;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Sandbox};
use zpod_proto::guest::{MarkRequest, PropertiesRequest, QuotaMode, SetPropertiesRequest, UnmarkRequest};
use zpod_volume::{self as volume, Bytes, DiskLayout, Mark, SnapshotId};

use crate::disk::pod;
use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);
const TOTAL: &str = "df -P -B1 /data | awk 'NR==2{print $2}'";

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

async fn check(pod: &mut Sandbox, image: &Image, wanted: &[(&str, &str)]) -> Result<()> {
    for (key, want) in wanted {
        let get = format!("zfs get -H -p -o value {key} {}", image.spec.dataset());
        assert_eq!(pod.zfs_tool("tools", &get).await?, *want, "{key}");
    }
    Ok(())
}

#[tokio::test]
async fn a_volume_in_use_takes_other_properties_quotas_and_reservations_and_keeps_them() -> Result<()> {
    let dir = Workdir::new()?;
    let mut image = Image::new(&dir, "pvc-changing", SIZE)?;
    let mut first = pod(&dir).await?;
    first.run(Container::debug("tools")).await?;
    let app = |image: &Image| Container::new("app", [image.mount("/data")]);
    first.run(app(&image)).await?;
    first.sh("app", "head -c 20000000 /dev/urandom > /data/file; sync").await?;
    let mut control = first.control().await?;
    let change = || SetPropertiesRequest { volume_id: image.id(), ..SetPropertiesRequest::default() };
    let (capacity, kept) = (SIZE.0.to_string(), Bytes::mib(64).0.to_string());

    let dataset = [
        ("compression", "zstd-3"),
        ("recordsize", "16K"),
        ("atime", "on"),
        ("sync", "always"),
        ("logbias", "throughput"),
        ("primarycache", "metadata"),
    ];
    let request = || SetPropertiesRequest {
        dataset_properties: map(&dataset),
        pool_properties: map(&[("autotrim", "off")]),
        quota: Some(QuotaMode::Quota.into()),
        reservation_bytes: Some(Bytes::mib(64).0),
        ..change()
    };
    for _ in 0..2 {
        control.set_properties(request()).await?;
        check(&mut first, &image, &[("quota", capacity.as_str()), ("refquota", "0")]).await?;
    }
    let wanted: Vec<_> =
        dataset.iter().map(|&(key, value)| (key, if key == "recordsize" { "16384" } else { value })).collect();
    check(&mut first, &image, &wanted).await?;
    check(&mut first, &image, &[("refreservation", kept.as_str())]).await?;
    assert_eq!(first.sh("app", TOTAL).await?, SIZE.0.to_string());
    let told = control.properties(PropertiesRequest { volume_id: image.id() }).await?.into_inner();
    let get = |key: &str| told.dataset[key].as_str();
    assert_eq!((get("compression"), get("mountpoint"), get("quota")), ("zstd-3", "legacy", capacity.as_str()));
    assert_eq!((told.pool["autotrim"].as_str(), told.pool["ashift"].as_str()), ("off", "12"));

    // Unbounded, filled, and then nothing that would be below what it holds.
    let mode = |mode: QuotaMode| SetPropertiesRequest { quota: Some(mode.into()), ..change() };
    control.set_properties(mode(QuotaMode::None)).await?;
    let unbounded: u64 = first.sh("app", TOTAL).await?.parse()?;
    assert!(unbounded > SIZE.0 && unbounded < DiskLayout::partition_for(SIZE).0, "{unbounded}");
    // The pool holds little more than the capacity: a device of the smallest size has room for some MiB beside it.
    let filled: u64 = first.sh("app", &format!("e2e fill /data/more {}", unbounded)).await?.parse()?;
    println!("{filled} bytes more could be written without a quota, df said {unbounded} in all");
    first.sh("app", "sync").await?;
    for refused in [QuotaMode::Refquota, QuotaMode::Quota] {
        match control.set_properties(mode(refused)).await {
            Err(error) => {
                println!("{error}");
                assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
                assert!(error.message().contains("holds"), "{error}");
            }
            // Where nothing more fits than the capacity, the quota fits too.
            Ok(_) => assert!(filled + 20_000_000 <= SIZE.0),
        }
    }
    first.sh("app", "rm /data/more; sync").await?;
    first.zfs_tool("tools", &format!("zpool sync {}", image.spec.pool)).await?;
    control.set_properties(SetPropertiesRequest { reservation_bytes: Some(0), ..mode(QuotaMode::Refquota) }).await?;
    check(&mut first, &image, &[("refquota", capacity.as_str()), ("quota", "0"), ("refreservation", "0")]).await?;

    for bad in [
        SetPropertiesRequest { dataset_properties: map(&[("mountpoint", "/")]), ..change() },
        SetPropertiesRequest { dataset_properties: map(&[("compression", "best")]), ..change() },
        SetPropertiesRequest { pool_properties: map(&[("ashift", "9")]), ..change() },
        SetPropertiesRequest { quota: Some(77), ..change() },
    ] {
        assert_eq!(control.set_properties(bad).await.unwrap_err().code(), Code::InvalidArgument);
    }
    first.kill();

    // What the next spec says is what the volume has, both ways.
    image.spec.reservation = Some(Bytes::mib(128));
    image.spec.quota = volume::QuotaMode::Quota;
    image.spec.dataset_properties = [("compression".into(), "lz4".into())].into();
    image.publish_again()?;
    let mut second = pod(&dir).await?;
    second.run(Container::debug("tools")).await?;
    second.run(app(&image)).await?;
    let kept = Bytes::mib(128).0.to_string();
    check(&mut second, &image, &[("compression", "lz4"), ("sync", "always"), ("quota", capacity.as_str())]).await?;
    check(&mut second, &image, &[("refquota", "0"), ("refreservation", kept.as_str())]).await?;

    // All of its capacity is kept for it, and most of it filled. There is room for a mark all the same.
    let mut control = second.control().await?;
    let volume_id = image.id();
    let all = SetPropertiesRequest { volume_id, reservation_bytes: Some(SIZE.0), ..SetPropertiesRequest::default() };
    control.set_properties(all).await?;
    check(&mut second, &image, &[("refreservation", capacity.as_str())]).await?;
    second.sh("app", "e2e fill /data/more 150000000; sync").await?;
    let mark = Mark::for_snapshot(SnapshotId::from_name("s")).to_string();
    control.mark(MarkRequest { volume_id: image.id(), mark: mark.clone() }).await?;
    check(&mut second, &image, &[("refreservation", "0")]).await?;
    control.unmark(UnmarkRequest { volume_id: image.id(), mark }).await?;
    check(&mut second, &image, &[("refreservation", capacity.as_str())]).await?;
    second.remove("app").await?;
    (image.spec.reservation, image.spec.quota) = (None, volume::QuotaMode::Refquota);
    image.publish()?;
    second.run(app(&image)).await?;
    check(&mut second, &image, &[("quota", "0"), ("refquota", capacity.as_str()), ("refreservation", "0")]).await?;
    assert_eq!(second.sh("app", "wc -c < /data/file").await?, "20000000");
    second.stop().await
}
