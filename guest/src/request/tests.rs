use super::*;
use proptest::prelude::*;
use std::collections::BTreeMap;
use uuid::Uuid;
use zpod_proto::agent::{CreateContainerRequest, FsGroup, Mount, Spec};
use zpod_proto::agent::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxResources};
use zpod_proto::ttrpc::Request;
use zpod_volume::{Bytes, Create, VolumeId};

fn spec(name: &str) -> VolumeSpec {
    VolumeSpec::new(VolumeId::from_name(name), Uuid::from_u128(7), Create::Fresh, Bytes::gib(1))
}

fn zfs_storage(name: &str) -> Storage {
    Storage {
        driver: "blk".into(),
        source: "02/01".into(),
        fstype: "zfs".into(),
        options: vec!["noatime".into(), spec(name).to_option()],
        mount_point: format!("/run/{name}"),
        fs_group: Some(FsGroup { group_id: 5, group_change_policy: 0 }),
        ..Storage::default()
    }
}

fn other_storage(name: &str) -> Storage {
    Storage { fstype: "ext4".into(), mount_point: name.into(), ..Storage::default() }
}

fn mount(options: Vec<String>) -> Mount {
    Mount { destination: "/data".into(), source: "/run/x".into(), r#type: "bind".into(), options }
}

fn frame(message: &CreateContainerRequest, tail: &[u8]) -> Vec<u8> {
    let mut payload = message.encode_to_vec();
    payload.extend_from_slice(tail);
    let request = Request {
        service: agent::SERVICE.into(),
        method: "CreateContainer".into(),
        payload,
        timeout_nano: 30_000_000_000,
        metadata: vec![],
    };
    let mut frame = request.encode_to_vec();
    frame.extend_from_slice(tail);
    frame
}

/// Unknown fields: number 1000 with the given bytes.
fn unknown(bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![0xc2, 0x3e, bytes.len() as u8];
    field.extend_from_slice(bytes);
    field
}

#[test]
fn the_mounts_of_volumes_are_slaves_and_all_others_stay_as_they_are() {
    let options = |all: &[&str]| all.iter().map(|&option| option.to_owned()).collect::<Vec<_>>();
    let at = |source: &str, all: &[&str]| Mount { source: source.into(), ..mount(options(all)) };
    let of_volume = |options| at("/run/a", options);
    let mounts = |given: Vec<Mount>| CreateContainerRequest {
        container_id: "c1".into(),
        storages: vec![zfs_storage("a"), other_storage("/run/b")],
        oci: Some(Spec { mounts: given, ..Spec::default() }),
        ..CreateContainerRequest::default()
    };
    let given = vec![
        of_volume(&["rbind", "rprivate", "rw"]),
        of_volume(&["rbind", "private", "ro"]),
        of_volume(&["rbind", "rshared", "rw"]),
        at("/run/b", &["rbind", "rprivate", "rw"]),
        at("/run/a/sub", &["rbind", "rprivate", "rw"]),
    ];
    let mut want = given.clone();
    (want[0].options, want[1].options) = (options(&["rbind", "rslave", "rw"]), options(&["rbind", "slave", "ro"]));
    let decoded = CreateContainer::decode(&frame(&mounts(given), &[])).unwrap();
    let rewritten = Request::decode(decoded.rewritten.unwrap().as_slice()).unwrap();
    let message = CreateContainerRequest::decode(rewritten.payload.as_slice()).unwrap();
    assert_eq!(message.oci.unwrap().mounts, want);
}

#[test]
fn our_storage_and_our_option_go_and_the_rest_stays() {
    let message = |storages, options| CreateContainerRequest {
        container_id: "c1".into(),
        exec_id: "e".into(),
        storages,
        oci: Some(Spec { version: "1.2".into(), mounts: vec![mount(options)], ..Spec::default() }),
        ..CreateContainerRequest::default()
    };
    let option = spec("pvc-1").to_option();
    let sent =
        message(vec![other_storage("a"), zfs_storage("pvc-1"), other_storage("b")], vec!["rbind".into(), option]);
    let wanted = message(vec![other_storage("a"), other_storage("b")], vec!["rbind".into()]);
    let tail = unknown(b"from the future");

    let request = CreateContainer::decode(&frame(&sent, &tail)).unwrap();
    assert_eq!(request.container, "c1");
    assert_eq!(request.rewritten.unwrap(), frame(&wanted, &tail));
    let [volume] = &request.volumes[..] else { panic!("{:?}", request.volumes) };
    assert_eq!(volume.spec, spec("pvc-1"));
    assert_eq!((volume.mount_point.as_str(), volume.fs_group), ("/run/pvc-1", Some(5)));
    assert_eq!(volume.options, ["noatime"]);
}

#[test]
fn a_request_without_volumes_is_left_alone() {
    let message = CreateContainerRequest { storages: vec![other_storage("a")], ..CreateContainerRequest::default() };
    let request = CreateContainer::decode(&frame(&message, &[])).unwrap();
    assert_eq!((request.rewritten, request.volumes.len()), (None, 0));
}

#[test]
fn a_zfs_storage_that_is_not_ours_never_reaches_the_agent() {
    type Spoil = fn(&mut Storage);
    let cases: [(Spoil, &str); 4] = [
        (|s| s.options.clear(), "no zpod= option"),
        (|s| s.options[1] = "zpod=e30".into(), "not a VolumeSpec"),
        (|s| s.options[1] = "zpod=%".into(), "not base64url"),
        (|s| s.options.push(s.options[1].clone()), "more than one zpod= option"),
    ];
    for (spoil, want) in cases {
        let mut storage = zfs_storage("pvc-1");
        spoil(&mut storage);
        let message = CreateContainerRequest { storages: vec![storage], ..CreateContainerRequest::default() };
        let error = CreateContainer::decode(&frame(&message, &[])).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("/run/pvc-1"), "{error}");
    }
}

#[test]
fn a_block_device_is_never_mounted() {
    let block = VolumeSpec { mode: zpod_volume::VolumeMode::Block, ..spec("pvc-1") };
    let storage = Storage { options: vec![block.to_option()], ..zfs_storage("pvc-1") };
    let message = CreateContainerRequest { storages: vec![storage], ..CreateContainerRequest::default() };
    let error = CreateContainer::decode(&frame(&message, &[])).unwrap_err().to_string();
    assert!(error.contains("/run/pvc-1") && error.contains("can't be mounted"), "{error}");
}

#[test]
fn what_two_parsers_could_read_differently_is_refused() {
    let message = CreateContainerRequest { container_id: "c1".into(), ..CreateContainerRequest::default() };
    let twice = [frame(&message, &[]), frame(&message, &[])].concat();
    assert!(matches!(CreateContainer::decode(&twice), Err(RequestError::Twice("service"))));
    let two_names = frame(&message, &[0x0a, 2, b'c', b'2']);
    assert!(matches!(CreateContainer::decode(&two_names), Err(RequestError::Twice(_))));
}

#[test]
fn a_request_is_known_by_service_and_method_in_any_order() {
    let field = |number: u8, text: &str| [&[number << 3 | 2, text.len() as u8][..], text.as_bytes()].concat();
    let (service, method) = (field(1, agent::SERVICE), field(2, "RemoveContainer"));
    let ours = Peek::Ours(Method::RemoveContainer);
    for (prefix, want) in [
        ([service.clone(), method.clone()].concat(), ours),
        ([method.clone(), service.clone()].concat(), ours),
        ([method.clone(), field(3, "payload"), service.clone()].concat(), ours),
        ([service.clone(), method[..5].to_vec()].concat(), Peek::Undecided),
        (method.clone(), Peek::Undecided),
        (vec![], Peek::Undecided),
        (field(1, "grpc.Health"), Peek::Theirs),
        (field(2, "StartContainer"), Peek::Theirs),
        (vec![0xff; 20], Peek::Malformed),
    ] {
        assert_eq!(peek(&prefix), want, "{prefix:?}");
    }
}

#[test]
fn what_the_agent_could_read_as_a_call_of_ours_is_not_passed_on_as_another() {
    let field = |number: u8, text: &str| [&[number << 3 | 2, text.len() as u8][..], text.as_bytes()].concat();
    let (service, method) = (field(1, agent::SERVICE), field(2, "CreateContainer"));
    assert_eq!(whose(&[service.clone(), method.clone()].concat()).unwrap(), Some(Method::CreateContainer));
    for (others, want) in [
        (vec![], "none"),
        // An unknown group, empty, before the envelope: prost skips it.
        (vec![0xc3, 0x3e, 0xc4, 0x3e], "not a protobuf message"),
        // The last of two counts.
        (field(1, "grpc.Health"), "service stands in it twice"),
        (field(2, "StartContainer"), "method stands in it twice"),
    ] {
        let sent = [others, service.clone(), method.clone()].concat();
        let read = Request::decode(&sent[..]).unwrap();
        assert_eq!((read.service.as_str(), read.method.as_str()), (agent::SERVICE, "CreateContainer"));
        match whose(&sent) {
            Ok(found) => assert_eq!((found, want), (Some(Method::CreateContainer), "none")),
            Err(error) => assert!(error.to_string().contains(want), "{error}"),
        }
    }
    // Cut short, or with rubbish at its end.
    for end in [&[0x1a, 9][..], &[0xff; 20], &[0xc4, 0x3e]] {
        let sent = [service.clone(), field(2, "StartContainer"), end.to_vec()].concat();
        assert!(matches!(whose(&sent), Err(RequestError::Wire(_))), "{end:?}");
    }
    assert_eq!(whose(&[field(1, "grpc.Health"), method].concat()).unwrap(), None);
    assert_eq!(whose(&[service, field(2, "StartContainer")].concat()).unwrap(), None);
    assert_eq!(whose(&[]).unwrap(), None);
}

#[test]
fn a_timeout_is_read_where_there_is_one() {
    let timeout = |timeout_nano| {
        let frame = Request { timeout_nano, ..Request::default() }.encode_to_vec();
        Envelope::decode(&frame).unwrap().timeout
    };
    assert_eq!(timeout(0), None);
    assert_eq!(timeout(-1), None);
    assert_eq!(timeout(1_500_000_000), Some(Duration::from_millis(1500)));
}

fn block_device(path: &str, id: &str) -> Device {
    Device { id: id.into(), r#type: "blk".into(), container_path: path.into(), ..Device::default() }
}

fn oci_device(path: &str, major: i64, minor: i64) -> LinuxDevice {
    LinuxDevice { path: path.into(), r#type: "b".into(), major, minor, file_mode: 0o660, ..LinuxDevice::default() }
}

fn rule(major: i64, minor: i64, access: &str) -> LinuxDeviceCgroup {
    LinuxDeviceCgroup { allow: true, r#type: "b".into(), major, minor, access: access.into() }
}

fn with_devices(
    devices: Vec<Device>,
    oci: Vec<LinuxDevice>,
    rules: Option<Vec<LinuxDeviceCgroup>>,
) -> CreateContainerRequest {
    let linux = Linux {
        devices: oci,
        resources: rules.map(|devices| LinuxResources { devices }),
        cgroups_path: "/x".into(),
        ..Linux::default()
    };
    CreateContainerRequest {
        container_id: "c1".into(),
        devices,
        oci: Some(Spec { linux: Some(linux), ..Spec::default() }),
        ..CreateContainerRequest::default()
    }
}

fn nodes(path: &str, minor: u32, read_only: bool) -> BTreeMap<String, Node> {
    [(path.to_owned(), Node { major: 230, minor, read_only })].into()
}

#[test]
fn a_device_of_ours_becomes_what_the_agent_would_have_made_of_it() {
    let (ours, theirs) = (block_device("/dev/xvda", "02/01"), block_device("/dev/xvdb", "02/02"));
    let char_device = LinuxDevice { r#type: "c".into(), ..oci_device("/dev/fuse", 7, 5) };
    let sent = with_devices(
        vec![ours, theirs.clone()],
        vec![oci_device("/dev/xvda", 7, 5), oci_device("/dev/xvdb", 7, 6), char_device.clone()],
        Some(vec![rule(7, 5, "rw"), rule(7, 6, "rw")]),
    );
    let wanted = with_devices(
        vec![theirs.clone()],
        vec![oci_device("/dev/xvda", 230, 16), oci_device("/dev/xvdb", 7, 6), char_device],
        Some(vec![rule(230, 16, "rw"), rule(7, 6, "rw"), rule(230, 16, "rwm")]),
    );
    let sent = frame(&sent, &unknown(b"later"));
    let request = CreateContainer::decode(&sent).unwrap();
    assert_eq!(request.devices.len(), 2);
    assert!(request.rewritten.is_none());
    let rewritten = hand_out(&sent, &nodes("/dev/xvda", 16, false)).unwrap();
    let message = |frame: &[u8]| CreateContainerRequest::decode(Envelope::decode(frame).unwrap().payload).unwrap();
    assert_eq!(message(&rewritten), message(&frame(&wanted, &unknown(b"later"))));
    assert!(rewritten.ends_with(&unknown(b"later")), "unknown fields stay");
    // A container that may only read: its rule says so.
    let read_only = message(&hand_out(&sent, &nodes("/dev/xvda", 16, true)).unwrap());
    let rules = read_only.oci.unwrap().linux.unwrap().resources.unwrap().devices;
    assert_eq!(rules.last(), Some(&rule(230, 16, "rm")));
}

#[test]
fn a_device_that_the_spec_does_not_have_once_is_refused() {
    let device = || block_device("/dev/xvda", "02/01");
    let refused = |message: &CreateContainerRequest| {
        let error = hand_out(&frame(message, &[]), &nodes("/dev/xvda", 0, false)).unwrap_err();
        assert!(error.to_string().contains("/dev/xvda"), "{error}");
    };
    refused(&with_devices(vec![device()], vec![oci_device("/dev/other", 7, 5)], None));
    refused(&with_devices(vec![device()], vec![oci_device("/dev/xvda", 7, 5), oci_device("/dev/xvda", 7, 6)], None));
    let char_device = LinuxDevice { r#type: "c".into(), ..oci_device("/dev/xvda", 7, 5) };
    refused(&with_devices(vec![device()], vec![char_device], None));
    refused(&CreateContainerRequest { devices: vec![device()], ..CreateContainerRequest::default() });
    let twice = with_devices(vec![device(), device()], vec![oci_device("/dev/xvda", 7, 5)], None);
    assert!(matches!(CreateContainer::decode(&frame(&twice, &[])), Err(RequestError::NoDevice(_))));
}

#[test]
fn every_kind_of_disk_that_the_agent_knows_is_looked_at() {
    for kind in ["blk", "scsi", "mmioblk", "nvdimm", "blk-ccw"] {
        let disk = Device { r#type: kind.into(), ..block_device("/dev/xvda", "x") };
        let request = CreateContainer::decode(&frame(&with_devices(vec![disk], vec![], None), &[])).unwrap();
        assert_eq!(request.devices.len(), 1, "{kind}");
    }
}

#[test]
fn devices_that_are_no_disks_are_not_looked_at() {
    let vfio = Device { r#type: "vfio-pci".into(), ..block_device("/dev/vfio/1", "x") };
    let request = CreateContainer::decode(&frame(&with_devices(vec![vfio], vec![], None), &[])).unwrap();
    assert_eq!((request.devices.len(), request.rewritten), (0, None));
}

fn storages() -> impl Strategy<Value = Vec<(bool, String)>> {
    proptest::collection::vec((any::<bool>(), "[a-z]{1,8}"), 0..6)
}

proptest! {
    #[test]
    fn splicing_takes_out_ours_and_keeps_every_other_byte(
        storages in storages(),
        options in proptest::collection::vec(("[a-z=]{0,12}", any::<bool>()), 0..5),
        junk in proptest::collection::vec(any::<u8>(), 0..100),
        id in "[a-z0-9]{1,64}",
    ) {
        let build = |ours: bool| CreateContainerRequest {
            container_id: id.clone(),
            storages: storages
                .iter()
                .filter(|(zfs, _)| ours || !zfs)
                .map(|(zfs, name)| if *zfs { zfs_storage(name) } else { other_storage(name) })
                .collect(),
            oci: Some(Spec {
                mounts: vec![mount(
                    options
                        .iter()
                        .filter(|(_, zpod)| ours || !zpod)
                        .map(|(text, zpod)| if *zpod { format!("zpod={text}") } else { text.clone() })
                        .filter(|text| ours || !text.starts_with("zpod="))
                        .collect(),
                )],
                hostname: "h".into(),
                ..Spec::default()
            }),
            ..CreateContainerRequest::default()
        };
        let tail = unknown(&junk);
        let sent = frame(&build(true), &tail);
        let request = CreateContainer::decode(&sent).unwrap();
        prop_assert_eq!(request.rewritten.unwrap_or(sent), frame(&build(false), &tail));
        prop_assert_eq!(request.volumes.len(), storages.iter().filter(|(zfs, _)| *zfs).count());
    }

    #[test]
    fn no_bytes_make_the_parsers_panic(bytes in any::<Vec<u8>>(), cut in any::<prop::sample::Index>()) {
        let _ = (peek(&bytes), whose(&bytes));
        let _ = Envelope::decode(&bytes);
        let _ = CreateContainer::decode(&bytes);
        let _ = hand_out(&bytes, &nodes("/dev/x", 1, false));
        let message = CreateContainerRequest { storages: vec![zfs_storage("x")], ..CreateContainerRequest::default() };
        let mut sound = frame(&message, &unknown(&[1, 2]));
        let at = cut.index(sound.len());
        sound.splice(at..(at + bytes.len()).min(sound.len()), bytes);
        let _ = (peek(&sound), whose(&sound));
        let _ = CreateContainer::decode(&sound);
        let _ = hand_out(&sound, &nodes("/dev/x", 1, false));
    }

    #[test]
    fn no_bytes_that_the_agent_reads_as_a_call_of_ours_are_passed_on_as_another(
        bytes in any::<Vec<u8>>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut frame = frame(&CreateContainerRequest::default(), &[]);
        let at = cut.index(frame.len());
        frame.splice(at..at, bytes);
        let named = |read: &Request| (read.service == agent::SERVICE).then(|| Method::named(read.method.as_bytes()));
        if let Ok(read) = Request::decode(&frame[..]) {
            prop_assert!(whose(&frame).map_or(true, |found| found == named(&read).flatten()));
        }
    }

    #[test]
    fn a_decision_once_made_stays_with_more_bytes(cut in any::<prop::sample::Index>()) {
        let whole = frame(&CreateContainerRequest::default(), &[]);
        let early = peek(&whole[..cut.index(whole.len())]);
        prop_assert!(early == Peek::Undecided || early == peek(&whole));
    }
}
