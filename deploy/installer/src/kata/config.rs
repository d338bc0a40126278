//! What Kata's configuration files name as initrd.

use std::path::PathBuf;

use serde::Deserialize;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    hypervisor: toml::map::Map<String, toml::Value>,
}

/// The first `initrd` of any `[hypervisor.*]` that is not empty.
///
/// # Errors
/// The text is no TOML.
pub(super) fn initrd(text: &str) -> Result<Option<PathBuf>, String> {
    let config: Config = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    let named = config.hypervisor.values().filter_map(|section| section.get("initrd")?.as_str());
    Ok(named.filter(|path| !path.is_empty()).map(PathBuf::from).next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_initrd_is_found_in_any_hypervisors_section() {
        let text = "[hypervisor.qemu]\npath = \"/opt/kata/bin/qemu\"\ninitrd = \"/a/b.img\"\n[agent.kata]\n";
        assert_eq!(initrd(text), Ok(Some(PathBuf::from("/a/b.img"))));
        assert_eq!(initrd("[hypervisor.clh]\n# initrd = \"/a\"\nimage = \"/c\"\n"), Ok(None));
        assert_eq!(initrd("[hypervisor.clh]\ninitrd = \"\"\n"), Ok(None));
        assert_eq!(initrd("[runtime]\n"), Ok(None));
        assert!(initrd("[hypervisor.qemu\n").is_err());
    }
}
