//! ZFS itself in a CreateContainer request: the device, and the tools.
//!
//! # Design
//! kata-agent makes an OCI device without an entry of its own as it stands, and so it does with a bind mount of a directory
//! of the guest. The mount comes last, so that a mount of the pod's at a directory above does not hide it. Where the pod
//! has something of its own at the tools' place, or below it, that is what it wants there, and the tools are left out.

use prost::Message as _;
use zpod_proto::agent::{LinuxDevice, LinuxDeviceCgroup, Mount};

use super::{RequestError, once, replaced};
use crate::launcher::PLACE;
use crate::machine::DeviceNumber;
use crate::wire::{self, Edit};

/// Where ZFS's tools look for its device.
const DEVICE: &str = "/dev/zfs";
/// How a character device is called in the OCI spec.
const CHARACTER: &str = "c";
/// What whom may do with the device is ZFS's to decide, by each call: the node itself is open, as udev's rules of OpenZFS
/// have it.
const MODE: u32 = 0o666;

/// The payload of a CreateContainer frame with ZFS's device, and its tools, which are in this directory of the guest.
///
/// # Errors
/// When it is not well-formed, or has no part for Linux.
pub fn give_zfs(frame: &[u8], device: DeviceNumber, tools: &str) -> Result<Vec<u8>, RequestError> {
    let (mut specs, mut given) = (false, false);
    let edited = wire::rewrite(frame, |field| {
        let (3, Some(message)) = (field.number, field.bytes(frame)) else { return Ok(Edit::Keep) };
        let edited = wire::rewrite(message, |field| {
            let (6, Some(oci)) = (field.number, field.bytes(message)) else { return Ok(Edit::Keep) };
            once(&mut specs, "OCI")?;
            let (edited, found) = with_zfs(oci, device, tools)?;
            given = found;
            Ok::<_, RequestError>(Edit::Replace(edited))
        })?;
        Ok::<_, RequestError>(replaced(edited))
    })?;
    match edited.filter(|_| given) {
        Some(edited) => Ok(edited),
        None => Err(RequestError::NoLinux),
    }
}

/// The OCI spec with both, and whether it has a part for Linux.
fn with_zfs(oci: &[u8], device: DeviceNumber, tools: &str) -> Result<(Vec<u8>, bool), RequestError> {
    let (mut linuxes, mut taken) = (false, false);
    let edited = wire::rewrite(oci, |field| match (field.number, field.bytes(oci)) {
        (5, Some(mount)) => {
            let destination = Mount::decode(mount)?.destination;
            taken |= std::path::Path::new(&destination).starts_with(PLACE);
            Ok(Edit::Keep)
        }
        (8, Some(part)) => {
            once(&mut linuxes, "Linux")?;
            Ok::<_, RequestError>(Edit::Replace(linux(part, device)?))
        }
        _ => Ok(Edit::Keep),
    })?;
    let mut out = edited.unwrap_or_else(|| oci.to_vec());
    if !taken {
        let mount = Mount {
            destination: PLACE.to_owned(),
            source: tools.to_owned(),
            r#type: "bind".to_owned(),
            options: ["bind", "ro", "nosuid", "nodev", "rprivate"].map(str::to_owned).to_vec(),
        };
        wire::put_message(&mut out, 5, &mount.encode_to_vec());
    }
    Ok((out, linuxes))
}

/// The `Linux` of an OCI spec with the device, and a rule for it. A device of that path that is there already is one of the
/// host's, as a privileged container has them: its numbers mean something else here.
fn linux(part: &[u8], device: DeviceNumber) -> Result<Vec<u8>, RequestError> {
    let (major, minor) = (i64::from(device.major), i64::from(device.minor));
    let edited = wire::rewrite(part, |field| match (field.number, field.bytes(part)) {
        (7, Some(bytes)) if LinuxDevice::decode(bytes)?.path == DEVICE => Ok(Edit::Drop),
        (4, Some(resources)) => {
            let mut resources = resources.to_vec();
            let (r#type, access) = (CHARACTER.to_owned(), "rwm".to_owned());
            let rule = LinuxDeviceCgroup { allow: true, r#type, major, minor, access };
            wire::put_message(&mut resources, 1, &rule.encode_to_vec());
            Ok(Edit::Replace(resources))
        }
        _ => Ok::<_, RequestError>(Edit::Keep),
    })?;
    let mut out = edited.unwrap_or_else(|| part.to_vec());
    let node = LinuxDevice {
        path: DEVICE.to_owned(),
        r#type: CHARACTER.to_owned(),
        major,
        minor,
        file_mode: MODE,
        ..LinuxDevice::default()
    };
    wire::put_message(&mut out, 7, &node.encode_to_vec());
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_proto::agent::{CreateContainerRequest, Linux, LinuxResources, Spec};
    use zpod_proto::ttrpc::Request;

    const ZFS: DeviceNumber = DeviceNumber { major: 10, minor: 249 };
    const TOOLS: &str = "/zpod/container";

    fn frame(spec: Option<Spec>) -> Vec<u8> {
        let message = CreateContainerRequest { container_id: "c1".into(), oci: spec, ..Default::default() };
        Request { payload: message.encode_to_vec(), ..Request::default() }.encode_to_vec()
    }

    fn spec(mounts: &[&str], devices: Vec<LinuxDevice>, resources: Option<LinuxResources>) -> Spec {
        let mount = |at: &&str| Mount { destination: (*at).to_owned(), source: "/run/x".into(), ..Mount::default() };
        let linux = Linux { devices, resources, cgroups_path: "/x".into(), ..Linux::default() };
        Spec { mounts: mounts.iter().map(mount).collect(), linux: Some(linux), ..Spec::default() }
    }

    fn given(spec: Spec) -> Spec {
        let frame = give_zfs(&frame(Some(spec)), ZFS, TOOLS).unwrap();
        let payload = Request::decode(&frame[..]).unwrap().payload;
        CreateContainerRequest::decode(&payload[..]).unwrap().oci.unwrap()
    }

    fn device(path: &str, major: i64) -> LinuxDevice {
        LinuxDevice { path: path.into(), r#type: "c".into(), major, minor: 249, file_mode: 0o666, ..Default::default() }
    }

    #[test]
    fn a_container_gets_the_device_a_rule_for_it_and_the_tools_behind_its_own_mounts() {
        let rule = |major, access: &str| LinuxDeviceCgroup {
            allow: true,
            r#type: "c".into(),
            major,
            minor: 249,
            access: access.into(),
        };
        let sent = spec(
            &["/opt", "/data"],
            vec![device("/dev/fuse", 10)],
            Some(LinuxResources { devices: vec![rule(1, "r")] }),
        );
        let found = given(sent.clone());
        let linux = found.linux.unwrap();
        assert_eq!(linux.devices, [device("/dev/fuse", 10), device("/dev/zfs", 10)]);
        assert_eq!(linux.resources.unwrap().devices, [rule(1, "r"), rule(10, "rwm")]);
        assert_eq!(linux.cgroups_path, "/x");
        let [opt, data, tools] = &found.mounts[..] else { panic!("{:?}", found.mounts) };
        assert_eq!([opt.clone(), data.clone()].to_vec(), sent.mounts);
        assert_eq!((tools.destination.as_str(), tools.source.as_str(), tools.r#type.as_str()), (PLACE, TOOLS, "bind"));
        for option in ["ro", "nosuid", "nodev"] {
            assert!(tools.options.iter().any(|given| given == option), "{option}");
        }
    }

    #[test]
    fn a_device_of_the_hosts_gives_way_and_a_mount_of_the_pods_does_not() {
        let privileged = given(spec(&[], vec![device("/dev/zfs", 200), device("/dev/null", 1)], None)).linux.unwrap();
        assert_eq!(privileged.devices, [device("/dev/null", 1), device("/dev/zfs", 10)]);
        assert_eq!(privileged.resources, None, "nothing is made where the shim sent nothing");
        for own in ["/opt/zpod", "/opt/zpod/bin"] {
            assert_eq!(given(spec(&[own], vec![], None)).mounts.len(), 1, "{own}");
        }
        assert_eq!(given(spec(&["/opt/zpods"], vec![], None)).mounts.len(), 2);
    }

    #[test]
    fn a_request_that_can_not_have_it_is_refused() {
        for spec in [None, Some(Spec::default())] {
            let error = give_zfs(&frame(spec), ZFS, TOOLS).unwrap_err().to_string();
            assert!(error.contains("/dev/zfs") && error.contains("Linux"), "{error}");
        }
        assert!(give_zfs(&[0xff; 9], ZFS, TOOLS).is_err());
    }
}
