use std::fmt;
use std::str::FromStr;

/// Kata's runtimes, which treat disks differently: see docs/limitations.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KataRuntime {
    /// The runtime in Go.
    Go,
    /// runtime-rs, in Rust.
    Rust,
}

impl FromStr for KataRuntime {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "go" => Ok(Self::Go),
            "rust" => Ok(Self::Rust),
            other => Err(format!("{other:?} is none of Kata's runtimes; allowed is go or rust")),
        }
    }
}

impl fmt::Display for KataRuntime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Go => "go",
            Self::Rust => "rust",
        })
    }
}

/// A handler of RuntimeClasses whose guests have zpod-guest: `kata-zpod`, or `kata-zpod=go`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeHandler {
    /// Its name, as the container runtime knows it.
    pub name: String,
    /// What is behind it. Where that is not known, nothing is refused because of it.
    pub runtime: Option<KataRuntime>,
}

impl FromStr for RuntimeHandler {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, runtime) = match text.split_once('=') {
            Some((name, runtime)) => (name, Some(runtime.parse()?)),
            None => (text, None),
        };
        match name {
            "" => Err("a handler has a name".to_owned()),
            name => Ok(Self { name: name.to_owned(), runtime }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handler_is_a_name_and_may_say_which_runtime_it_is() {
        for (text, want) in [
            ("kata-zpod", Some(("kata-zpod", None))),
            ("kata-zpod=go", Some(("kata-zpod", Some(KataRuntime::Go)))),
            ("kata-zpod-rs=rust", Some(("kata-zpod-rs", Some(KataRuntime::Rust)))),
            ("kata-zpod=c", None),
            ("=go", None),
            ("", None),
        ] {
            let parsed = text.parse::<RuntimeHandler>().ok();
            assert_eq!(parsed.as_ref().map(|handler| (handler.name.as_str(), handler.runtime)), want, "{text:?}");
        }
    }
}
