use std::fmt;

/// Why a command did not do what it was asked, and what to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Which exit code it ends with.
    pub kind: Kind,
    what: String,
    remedy: String,
}

/// Kinds of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It failed.
    Failed,
    /// The arguments make no sense.
    Usage,
    /// There is no such thing.
    NotFound,
    /// The doctor found something broken, and has said so.
    Findings,
    /// It was waited for in vain.
    TimedOut,
    /// A signal ended it.
    Interrupted,
}

impl Kind {
    /// The exit code.
    pub const fn code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Findings => 4,
            Self::TimedOut => 5,
            Self::Interrupted => 130,
        }
    }
}

impl Failure {
    /// Of any kind. An empty remedy is none.
    pub fn new(kind: Kind, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { kind, what: what.into(), remedy: remedy.into() }
    }

    /// What went wrong, without what to do.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// It failed.
    pub fn failed(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Kind::Failed, what, remedy)
    }

    /// The arguments make no sense.
    pub fn usage(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what, remedy)
    }

    /// There is no such thing.
    pub fn not_found(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, what, remedy)
    }

    /// It was waited for in vain.
    pub fn timed_out(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(Kind::TimedOut, what, remedy)
    }

    /// A question to the API server that failed.
    pub fn api(what: &str, error: &kube::Error) -> Self {
        let remedy = match error {
            kube::Error::Api(status) if status.code == 403 => {
                "your account lacks the right: docs/kubectl-zpod.md has the rules that each command needs"
            }
            kube::Error::Api(status) if status.code == 401 => "log in to the cluster again",
            kube::Error::Api(status) if status.code == 404 => {
                "is zpod installed in this cluster? `kubectl get crd zfsvolumes.zpod.storage` should find its kind"
            }
            kube::Error::Api(_) => "",
            _ => "see whether `kubectl version` reaches the API server; --context and --kubeconfig choose another",
        };
        let reason = match error {
            kube::Error::Api(status) => status.message.clone(),
            other => with_causes(other),
        };
        Self::failed(format!("{what}: {reason}"), remedy)
    }
}

/// An error with what lies behind it.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// As it is shown: nothing where all has been said.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.what.is_empty() {
            writeln!(f, "error: {}", self.what)?;
        }
        if !self.remedy.is_empty() {
            writeln!(f, "remedy: {}", self.remedy)?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_and_what_to_do_are_lines_of_their_own() {
        let failure = Failure::not_found("there is no claim x", "look at `kubectl get pvc`");
        assert_eq!(failure.to_string(), "error: there is no claim x\nremedy: look at `kubectl get pvc`\n");
        assert_eq!(Failure::failed("x", "").to_string(), "error: x\n");
        assert_eq!(Failure::new(Kind::Findings, "", "").to_string(), "");
    }

    #[test]
    fn a_refusal_of_the_api_server_says_what_is_missing() {
        let status = |code| kube::core::Status::failure("no", "Forbidden").with_code(code);
        let failure = Failure::api("ZfsVolumes", &kube::Error::Api(status(403).boxed()));
        assert!(failure.to_string().contains("rules that each command needs"), "{failure}");
        let failure = Failure::api("ZfsVolumes", &kube::Error::Api(status(404).boxed()));
        assert!(failure.to_string().contains("is zpod installed"), "{failure}");
    }
}
