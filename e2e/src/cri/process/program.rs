//! What a container runs, and as whom.

use anyhow::{Context as _, Result, bail};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use crate::cri::api;
use crate::cri::images::Image;

/// containerd's default; kubelet sets none.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program with its identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::cri) struct Program {
    pub(in crate::cri) args: Vec<String>,
    /// `NAME=value`; of two with one name the later counts.
    pub(in crate::cri) env: Vec<String>,
    pub(in crate::cri) cwd: String,
    pub(in crate::cri) uid: u32,
    pub(in crate::cri) gid: u32,
    pub(in crate::cri) groups: Vec<u32>,
    capabilities: u64,
    pub(in crate::cri) no_new_privileges: bool,
}

impl Program {
    /// The program of a CRI container on an image.
    pub(in crate::cri) fn new(config: &api::ContainerConfig, image: &Image) -> Result<Self> {
        let command = if config.command.is_empty() { &image.entrypoint } else { &config.command };
        let args = [command.as_slice(), &config.args].concat();
        if args.is_empty() {
            bail!("no command: neither the pod nor the image {} names one", image.references.join(", "));
        }
        let security = config.linux.clone().unwrap_or_default().security_context.unwrap_or_default();
        let id = |value: &Option<api::Int64Value>| value.as_ref().map(|value| u32::try_from(value.value)).transpose();
        let named = match security.run_as_username.as_str() {
            "" => None,
            "root" => Some(0),
            name => Some(name.parse().with_context(|| format!("user {name:?}: images here have no user names"))?),
        };
        let uid = id(&security.run_as_user).context("runAsUser")?.or(named).unwrap_or(image.user);
        let groups: Result<_, _> = security.supplemental_groups.iter().map(|group| u32::try_from(*group)).collect();
        let variables = config.envs.iter().map(|pair| {
            let value = String::from_utf8(pair.value.clone()).with_context(|| format!("variable {}", pair.key))?;
            Ok(format!("{}={value}", pair.key))
        });
        Ok(Self {
            args,
            env: std::iter::once(Ok(PATH.to_owned())).chain(variables).collect::<Result<_>>()?,
            cwd: if config.working_dir.is_empty() { "/".to_owned() } else { config.working_dir.clone() },
            uid,
            gid: id(&security.run_as_group).context("runAsGroup")?.unwrap_or(0),
            groups: groups.context("supplementalGroups")?,
            capabilities: capabilities(&security)?.bits(),
            no_new_privileges: security.no_new_privs,
        })
    }

    /// The same with another command.
    pub(in crate::cri) fn with_args(&self, args: Vec<String>) -> Self {
        Self { args, ..self.clone() }
    }

    pub(in crate::cri) fn capabilities(&self) -> CapabilitySet {
        CapabilitySet::from_bits_retain(self.capabilities)
    }

    /// As the OCI runtime spec writes them.
    pub(in crate::cri) fn capability_names(&self) -> Vec<String> {
        self.capabilities().iter_names().map(|(name, _)| format!("CAP_{name}")).collect()
    }
}

/// containerd's defaults.
const DEFAULTS: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// Every capability that Linux names; `all()` would have bits that nobody knows.
pub(in crate::cri) fn every_capability() -> CapabilitySet {
    CapabilitySet::all().iter_names().map(|(_, capability)| capability).collect()
}

/// Defaults, all or nothing; then what is added, less what is dropped: containerd's order.
fn capabilities(security: &api::LinuxContainerSecurityContext) -> Result<CapabilitySet> {
    if security.privileged {
        return Ok(every_capability());
    }
    let asked = security.capabilities.clone().unwrap_or_default();
    let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case("ALL"));
    let mut set = match (all(&asked.add_capabilities), all(&asked.drop_capabilities)) {
        (true, _) => every_capability(),
        (false, true) => CapabilitySet::empty(),
        (false, false) => DEFAULTS,
    };
    set |= named(&asked.add_capabilities)?;
    set -= named(&asked.drop_capabilities)?;
    Ok(set)
}

fn named(names: &[String]) -> Result<CapabilitySet> {
    let mut set = CapabilitySet::empty();
    for name in names.iter().filter(|name| !name.eq_ignore_ascii_case("ALL")) {
        let upper = name.to_uppercase();
        let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
        set |= CapabilitySet::from_name(short).with_context(|| format!("unknown capability {name:?}"))?;
    }
    Ok(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let (references, entrypoint) = (vec!["tool".to_owned()], vec!["/tool".to_owned()]);
        Image { references, entrypoint, rootfs: None, libraries: false, user: 65532, id: String::new() }
    }

    fn container(security: api::LinuxContainerSecurityContext) -> api::ContainerConfig {
        let linux = Some(api::LinuxContainerConfig { security_context: Some(security) });
        api::ContainerConfig { linux, ..Default::default() }
    }

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_command_replaces_the_entrypoint_and_args_follow_it() {
        for (command, args, expected) in
            [("", "", "/tool"), ("", "-v", "/tool -v"), ("/sh -c", "true", "/sh -c true"), ("/sh", "", "/sh")]
        {
            let (command, args) = (words(command), words(args));
            let config = api::ContainerConfig { command, args, ..Default::default() };
            assert_eq!(Program::new(&config, &image()).unwrap().args, words(expected));
        }
        let nothing = Image { entrypoint: Vec::new(), ..image() };
        let error = Program::new(&api::ContainerConfig::default(), &nothing).unwrap_err();
        assert!(error.to_string().contains("tool"), "{error}");
    }

    #[test]
    fn the_user_is_the_pods_or_else_the_images() {
        let program = Program::new(&container(Default::default()), &image()).unwrap();
        assert_eq!((program.uid, program.gid), (65532, 0));
        let security = api::LinuxContainerSecurityContext {
            run_as_user: Some(api::Int64Value { value: 0 }),
            run_as_group: Some(api::Int64Value { value: 7 }),
            supplemental_groups: vec![2000],
            ..Default::default()
        };
        let program = Program::new(&container(security), &image()).unwrap();
        assert_eq!((program.uid, program.gid, program.groups), (0, 7, vec![2000]));
    }

    #[test]
    fn capabilities_are_the_defaults_with_what_is_added_without_what_is_dropped() {
        let set = |add: &str, drop: &str, privileged: bool| {
            let asked =
                api::Capability { add_capabilities: words(add), drop_capabilities: words(drop), ..Default::default() };
            let security =
                api::LinuxContainerSecurityContext { capabilities: Some(asked), privileged, ..Default::default() };
            Program::new(&container(security), &image()).map(|program| program.capability_names())
        };
        assert_eq!(set("", "", false).unwrap().len(), 14);
        assert!(set("", "", false).unwrap().contains(&"CAP_CHOWN".to_owned()));
        assert_eq!(set("SYS_ADMIN cap_lease", "ALL", false).unwrap(), ["CAP_SYS_ADMIN", "CAP_LEASE"]);
        assert_eq!(set("ALL", "SYS_ADMIN", false).unwrap().len(), 40);
        assert_eq!(set("", "", true).unwrap().len(), 41);
        assert!(set("FLY", "", false).unwrap_err().to_string().contains("FLY"));
    }
}
