use std::fmt;

/// Where ZFS keeps a property.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PropertyKind {
    /// Given at `zpool create`, fixed from then on.
    PoolAtCreation,
    /// A property of the pool.
    Pool,
    /// A property of the dataset.
    Dataset,
    /// Given when the volume of a block device (zvol) is made, fixed from then on.
    VolumeAtCreation,
}

/// A ZFS property that a StorageClass may set, with the values it may have. Values are those of zpoolprops(7) and
/// zfsprops(7) in OpenZFS 2.3, less those that give up the pool's ability to notice damage (`checksum=off`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Property {
    /// The parameter's key, which is the ZFS name of the property.
    pub key: &'static str,
    /// Where it belongs.
    pub kind: PropertyKind,
    /// What a new volume gets where the class says nothing; `None` leaves it to ZFS.
    pub default: Option<&'static str>,
    /// Whether it can change in the volume's life: a VolumeAttributesClass may set it.
    pub mutable: bool,
    /// Whether block devices (zvols) have it too.
    pub block: bool,
    values: Values,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    OneOf(&'static [&'static str]),
    /// A word of the list, or one of these prefixes with a number in the range behind it.
    OneOfOrLevel(&'static [&'static str], &'static [(&'static str, u32, u32)]),
    Number(u32, u32),
    /// A power of two, in bytes or with K or M behind it, as ZFS writes it.
    PowerOfTwo(u64, u64),
}

const ON_OFF: Values = Values::OneOf(&["on", "off"]);

/// Every property, in alphabetical order.
const ALL: [Property; 15] = [
    fixed("acltype", Some("posix"), Values::OneOf(&["off", "nfsv4", "posix"])),
    Property {
        key: "ashift",
        kind: PropertyKind::PoolAtCreation,
        default: Some("12"),
        mutable: false,
        block: true,
        values: Values::Number(9, 16),
    },
    files("atime", Some("off"), ON_OFF),
    Property {
        key: "autotrim",
        kind: PropertyKind::Pool,
        default: Some("on"),
        mutable: true,
        block: true,
        values: ON_OFF,
    },
    Property {
        mutable: false,
        ..any(
            "checksum",
            None,
            Values::OneOf(&["on", "fletcher2", "fletcher4", "sha256", "sha512", "skein", "edonr", "blake3"]),
        )
    },
    any(
        "compression",
        Some("lz4"),
        Values::OneOfOrLevel(
            &["on", "off", "lz4", "lzjb", "zle", "gzip", "zstd", "zstd-fast"],
            &[("gzip-", 1, 9), ("zstd-", 1, 19), ("zstd-fast-", 1, 10)],
        ),
    ),
    Property { mutable: false, ..any("copies", None, Values::Number(1, 3)) },
    Property {
        mutable: false,
        ..any("dedup", None, Values::OneOf(&["on", "off", "verify", "sha256", "sha512", "skein", "blake3"]))
    },
    any("logbias", None, Values::OneOf(&["latency", "throughput"])),
    any("primarycache", None, Values::OneOf(&["all", "none", "metadata"])),
    files("recordsize", None, Values::PowerOfTwo(512, 16 << 20)),
    files("snapdir", None, Values::OneOf(&["hidden", "visible"])),
    any("sync", None, Values::OneOf(&["standard", "always", "disabled"])),
    Property {
        key: "volblocksize",
        kind: PropertyKind::VolumeAtCreation,
        default: Some("16K"),
        mutable: false,
        block: true,
        values: Values::PowerOfTwo(4 << 10, 128 << 10),
    },
    fixed("xattr", Some("sa"), Values::OneOf(&["on", "off", "dir", "sa"])),
];

/// A property of file systems and block devices that can change.
const fn any(key: &'static str, default: Option<&'static str>, values: Values) -> Property {
    Property { key, kind: PropertyKind::Dataset, default, mutable: true, block: true, values }
}

/// One of file systems only that can change.
const fn files(key: &'static str, default: Option<&'static str>, values: Values) -> Property {
    Property { block: false, ..any(key, default, values) }
}

/// One of file systems only that stays as it was made.
const fn fixed(key: &'static str, default: Option<&'static str>, values: Values) -> Property {
    Property { mutable: false, ..files(key, default, values) }
}

impl Property {
    /// Every property there is.
    pub const fn all() -> &'static [Self] {
        &ALL
    }

    /// The property of that name.
    pub fn named(key: &str) -> Option<&'static Self> {
        ALL.iter().find(|property| property.key == key)
    }

    /// Whether the property may have this value.
    pub fn allows(&self, value: &str) -> bool {
        match self.values {
            Values::OneOf(words) => words.contains(&value),
            Values::OneOfOrLevel(words, levels) => {
                words.contains(&value)
                    || levels.iter().any(|(prefix, low, high)| {
                        value.strip_prefix(prefix).is_some_and(|level| in_range(level, *low, *high))
                    })
            }
            Values::Number(low, high) => in_range(value, low, high),
            Values::PowerOfTwo(low, high) => {
                power(value).is_some_and(|n| n.is_power_of_two() && (low..=high).contains(&n))
            }
        }
    }

    /// For a person: the values it may have.
    pub fn allowed(&self) -> impl fmt::Display {
        struct Allowed(Values);
        struct Short(u64);
        impl fmt::Display for Short {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    n if n >= 1 << 20 => write!(f, "{}M", n >> 20),
                    n if n >= 1 << 10 => write!(f, "{}K", n >> 10),
                    n => write!(f, "{n}"),
                }
            }
        }
        impl fmt::Display for Allowed {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    Values::OneOf(words) => f.write_str(&words.join(", ")),
                    Values::OneOfOrLevel(words, levels) => {
                        f.write_str(&words.join(", "))?;
                        levels.iter().try_for_each(|(prefix, low, high)| write!(f, ", {prefix}{low} to {prefix}{high}"))
                    }
                    Values::Number(low, high) => write!(f, "{low} to {high}"),
                    Values::PowerOfTwo(low, high) => {
                        write!(f, "a power of two from {} to {}, such as 16K", Short(low), Short(high))
                    }
                }
            }
        }
        Allowed(self.values)
    }
}

fn in_range(text: &str, low: u32, high: u32) -> bool {
    // No sign, no leading zero: ZFS gets the text as it is.
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    plain && text.parse::<u32>().is_ok_and(|n| (low..=high).contains(&n))
}

fn power(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_checked_as_zfs_would() {
        for (key, good, bad) in [
            (
                "compression",
                &["lz4", "zstd-19", "gzip-1", "zstd-fast-10"][..],
                &["zstd-20", "gzip-0", "gzip-", "LZ4", "zstd-01", ""][..],
            ),
            ("recordsize", &["4K", "128K", "1M", "16M", "131072"], &["3K", "32M", "256", "4k", "K", "4Ki", ""]),
            ("ashift", &["9", "12", "16"], &["8", "17", "012", "-12", "x"]),
            ("checksum", &["on", "blake3"], &["off", "noparity"]),
            ("copies", &["1", "3"], &["0", "4"]),
            ("sync", &["always"], &["never"]),
        ] {
            let property = Property::named(key).unwrap();
            for value in good {
                assert!(property.allows(value), "{key}={value}");
            }
            for value in bad {
                assert!(!property.allows(value), "{key}={value}");
            }
        }
    }

    #[test]
    fn every_default_is_an_allowed_value() {
        for property in Property::all() {
            assert!(property.default.is_none_or(|value| property.allows(value)), "{}", property.key);
        }
    }
}
