//! Receives of encrypted volumes that were cut short.

use super::*;
use crate::key::{Key, Keys};
use zpod_volume::Encryption;

const TOKEN: Uuid = Uuid::from_u128(7);

fn a(create: Create) -> Wanted {
    let mut wanted = wanted("a", create, "/m1");
    wanted.spec.encryption = Some(Encryption::Aes256Gcm);
    wanted
}

async fn start(disks: &Disks, create: Create) -> (Arc<Volumes<SimMachine>>, Result<Added, VolumeError>) {
    let volumes = guest(disks);
    let keys = Keys { key: Key::new(vec![b'k'; 32]).unwrap(), previous: None };
    volumes.provide_key(VolumeId::from_name("a"), TOKEN, keys).await.unwrap();
    let prepared = prepare(&volumes, "c1", a(create)).await;
    (volumes, prepared)
}

fn datasets(disks: &Disks) -> Vec<String> {
    let disks = disks.lock().unwrap();
    let names = disks[0].pool.as_ref().unwrap().datasets.keys();
    names.map(|name| name.rsplit('/').next().unwrap().to_owned()).collect()
}

#[tokio::test(start_paused = true)]
async fn a_receive_killed_between_the_renames_leaves_the_old_contents_and_after_them_the_new() {
    let disks = disks(&["a"]);
    let (volumes, prepared) = start(&disks, Create::Fresh).await;
    drop((volumes, prepared.unwrap()));
    let name = |name: &str| format!("{}/{name}", a(Create::Never).spec.pool);
    let change = |change: &dyn Fn(&mut std::collections::BTreeMap<String, crate::machine::Properties>)| {
        change(&mut disks.lock().unwrap()[0].pool.as_mut().unwrap().datasets);
    };
    change(&|all| {
        let data = all.remove(&name("data")).unwrap();
        all.insert(name("zpod-recv"), data.clone());
        all.insert(name("zpod-old"), data);
    });
    let (volumes, prepared) = start(&disks, Create::Never).await;
    drop((volumes, prepared.unwrap()));
    assert_eq!(datasets(&disks), ["data", "zpod-recv"], "the old contents, and what was received is not lost yet");
    change(&|all| {
        let new = all.remove(&name("zpod-recv")).unwrap();
        let old = all.insert(name("data"), new).unwrap();
        all.insert(name("zpod-old"), old.clone());
        all.insert(name("old"), old);
    });
    let (_, prepared) = start(&disks, Create::Never).await;
    let _ = prepared.unwrap();
    assert_eq!(datasets(&disks), ["data", "old"], "what is not ours stays");
}
