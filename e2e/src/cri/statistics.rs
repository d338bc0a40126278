//! Processor time and memory of a container's first process, which stands for all of it: there are no cgroups. With no
//! numbers at all kubelet has no statistics of the pod's volumes either.

use std::fs;

use nix::unistd::{SysconfVar, sysconf};

use super::container::Container;
use super::{api, filesystems};

pub(super) fn of(container: &Container) -> api::ContainerStats {
    let process = container.pod.machine.process(&container.id);
    let (cpu, memory) = process.and_then(usage).unwrap_or_default();
    let (timestamp, value) = (filesystems::now(), |value| Some(api::UInt64Value { value }));
    api::ContainerStats {
        attributes: Some(api::ContainerAttributes {
            id: container.id.clone(),
            metadata: container.config.metadata.clone(),
            labels: container.config.labels.clone(),
            annotations: container.config.annotations.clone(),
        }),
        cpu: Some(api::CpuUsage { timestamp, usage_core_nano_seconds: value(cpu) }),
        memory: Some(api::MemoryUsage { timestamp, working_set_bytes: value(memory) }),
    }
}

/// Nanoseconds and bytes, from `/proc/<pid>/stat`.
fn usage(process: u32) -> Option<(u64, u64)> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    let unit = |name| sysconf(name).ok().flatten().and_then(|value| u64::try_from(value).ok());
    parse(&stat, unit(SysconfVar::CLK_TCK)?, unit(SysconfVar::PAGE_SIZE)?)
}

fn parse(stat: &str, ticks: u64, page: u64) -> Option<(u64, u64)> {
    // The name in parentheses may have blanks in it; what follows it begins with field 3.
    let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let time = (field(14)? + field(15)?) * (1_000_000_000 / ticks);
    Some((time, field(24)? * page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_and_memory_are_found_behind_any_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 0 0 20 0 1 0 99 1000 300 18446744073709551615";
        assert_eq!(parse(stat, 100, 4096), Some((2_000_000_000, 300 * 4096)));
        assert_eq!(parse("", 100, 4096), None);
    }
}
