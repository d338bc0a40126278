use std::fs;
use std::path::Path;

use rustix::fs::Access;
use zpod_admin::Check;

use super::Places;
use crate::kata::discover;

pub(super) fn checks(places: &Places) -> Vec<Check> {
    vec![run_dirs(places), direct_volumes(&places.direct_volume_dir), guest_image(&places.guest_dir)]
}

fn run_dirs(places: &Places) -> Check {
    let name = "kata-run-dirs";
    let all: Vec<_> = places.kata_run_dirs.iter().map(|dir| dir.display().to_string()).collect();
    if !places.kata_run_dirs.iter().any(|dir| dir.is_dir()) {
        let remedy =
            "Kata makes them with its first pod; if one runs, see --kata-run-dir and whether they are mounted here";
        return Check::warn(name, format!("none of {} is there", all.join(", ")), remedy);
    }
    let sandboxes = discover(&places.kata_run_dirs).len();
    Check::ok(name, format!("{sandboxes} sandboxes in {}", all.join(", ")))
}

fn direct_volumes(dir: &Path) -> Check {
    let name = "direct-volumes";
    match rustix::fs::access(dir, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Check::ok(name, format!("{} can be written", dir.display())),
        Err(error) => {
            let remedy = "Kata looks for volumes there: it has to be the node's own directory, mounted writable";
            Check::fail(name, format!("{}: {error}", dir.display()), remedy)
        }
    }
}

fn guest_image(dir: &Path) -> Check {
    let name = "guest-image";
    if !dir.exists() && dir.parent().is_none_or(|parent| !parent.exists()) {
        let found = format!("{} can't be seen from here", dir.display());
        return Check::warn(name, found, "mount it read-only into zpod-node, or look on the node (--guest-dir)");
    }
    let missing = ["vmlinuz", "initrd"].into_iter().find(|file| {
        // Whole once it has its name: the installer makes a version aside.
        !fs::metadata(dir.join(file)).is_ok_and(|file| file.is_file() && file.len() > 0)
    });
    match missing {
        None => {
            let version = fs::read_link(dir).map(|link| format!(" ({})", link.display())).unwrap_or_default();
            Check::ok(name, format!("kernel and initrd are in {}{version}", dir.display()))
        }
        Some(file) => Check::fail(
            name,
            format!("{} is missing", dir.join(file).display()),
            "the init container guest-installer of zpod-node's pod puts it there: see its log",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_admin::Level;

    #[test]
    fn a_node_where_kata_has_never_run_and_one_that_is_whole_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let places = Places {
            backing_dir: path("volumes"),
            direct_volume_dir: path("direct"),
            kata_run_dirs: vec![path("kata"), path("vc")],
            guest_dir: path("zpod/guest"),
        };
        let levels = |places| checks(places).iter().map(|check| check.level).collect::<Vec<_>>();
        assert_eq!(levels(&places), [Level::Warn, Level::Fail, Level::Warn]);
        for name in ["direct", "vc", "zpod"] {
            fs::create_dir(path(name)).unwrap();
        }
        assert_eq!(levels(&places), [Level::Ok, Level::Ok, Level::Fail]);
        fs::create_dir(path("zpod/guest")).unwrap();
        fs::write(path("zpod/guest/vmlinuz"), "x").unwrap();
        fs::write(path("zpod/guest/initrd"), "").unwrap();
        assert!(checks(&places)[2].message.contains("initrd is missing"));
        fs::write(path("zpod/guest/initrd"), "x").unwrap();
        assert_eq!(levels(&places), [Level::Ok; 3]);
    }
}
