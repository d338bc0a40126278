//! Kata on a node, as far as zpod's installer and the shim player look at it: what kata-deploy 4.1.0 leaves, with the tests'
//! own initrd, and the drop-ins that it makes of our values.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::{Cluster, chart};
use crate::base_initrd;
use crate::shim::Handler;

const SHARE: &str = "opt/kata/share/kata-containers";
const INITRD: &str = "kata-ubuntu-resolute.initrd";
const VERSION: &str = "4.1.0\n";

/// Values of kata-deploy's chart.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Values {
    custom_runtimes: CustomRuntimes,
}

#[derive(Debug, Deserialize)]
struct CustomRuntimes {
    runtimes: BTreeMap<String, CustomRuntime>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct CustomRuntime {
    runtime_class: String,
    drop_in: String,
}

#[derive(Debug, Deserialize)]
struct RuntimeClass {
    handler: String,
}

/// Lays it out below a node's root; nothing when it is there.
pub(crate) fn deploy(root: &Path) -> Result<()> {
    let share = root.join(SHARE);
    if share.exists() {
        return Ok(());
    }
    for (handler, text) in drop_ins()? {
        let path = root.join(Handler::drop_in(&handler));
        let dir = path.parent().context("the root")?;
        fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    }
    fs::create_dir_all(&share).with_context(|| format!("create {}", share.display()))?;
    base_initrd::write(&share.join(INITRD))?;
    symlink(INITRD, share.join("kata-containers-initrd.img")).context("link the initrd")?;
    fs::write(root.join("opt/kata/VERSION"), VERSION).context("write Kata's version")
}

/// The drop-in of each handler, as our values for kata-deploy have it.
fn drop_ins() -> Result<Vec<(String, String)>> {
    let path = chart::chart().join("files/kata-deploy-values.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let values: Values = serde_yaml_ng::from_str(&text).with_context(|| format!("read {}", path.display()))?;
    let runtimes = values.custom_runtimes.runtimes.into_values();
    let drop_in = |runtime: CustomRuntime| {
        // kata-deploy goes by that, too.
        let class: RuntimeClass = serde_yaml_ng::from_str(&runtime.runtime_class).context("read a RuntimeClass")?;
        Ok((class.handler, runtime.drop_in))
    };
    runtimes.map(drop_in).collect()
}

/// A node whose shims plug no disks in for a handler, until this is dropped.
#[derive(Debug)]
#[must_use]
pub struct DisksDisabled {
    drop_in: PathBuf,
    before: String,
}

impl Drop for DisksDisabled {
    fn drop(&mut self) {
        if let Err(error) = fs::write(&self.drop_in, &self.before) {
            eprintln!("{} stays as it is: {error}", self.drop_in.display());
        }
    }
}

impl Cluster {
    /// Sets `disable_block_device_use = true` for a handler of a node, for the pods that start from now on.
    ///
    /// # Errors
    /// When the handler has no drop-in, or one that does not set it.
    pub fn disable_disks(&self, node: &str, handler: &str) -> Result<DisksDisabled> {
        let drop_in = self.node_dir(node).join(Handler::drop_in(handler));
        let before = fs::read_to_string(&drop_in).with_context(|| format!("read {}", drop_in.display()))?;
        let key = "disable_block_device_use =";
        let after = before.replace(&format!("{key} false"), &format!("{key} true"));
        ensure!(before != after, "{} does not set {key} false: {before}", drop_in.display());
        fs::write(&drop_in, after).with_context(|| format!("write {}", drop_in.display()))?;
        Ok(DisksDisabled { drop_in, before })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shim::Runtime;

    #[test]
    fn the_values_for_kata_deploy_have_the_runtime_in_go_plug_disks_in() {
        let root = tempfile::tempdir().unwrap();
        let plugs = |name: &str, runtime| Handler { name: name.into(), runtime }.plugs_disks(root.path()).unwrap();
        assert!(!plugs("stock", Runtime::Go) && plugs("stock", Runtime::Rs), "Kata's own defaults");
        let drop_ins = drop_ins().unwrap();
        assert_eq!(drop_ins.len(), 4);
        for (name, text) in drop_ins {
            let path = root.path().join(Handler::drop_in(&name));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            assert!(plugs(&name, if name.ends_with("-rs") { Runtime::Rs } else { Runtime::Go }), "{name}");
        }
    }
}
