use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Something long that is waited for: shown on stderr, and on a terminal only.
pub(crate) fn waiting(what: impl Into<String>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, target());
    bar.set_style(style("{spinner} {msg} ({elapsed})"));
    bar.set_message(what.into());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// Bytes that pass by. Without a total, only what has passed is shown.
pub(crate) fn bytes(what: impl Into<String>, total: Option<u64>) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(total, target());
    // ZFS's estimate is one: what is sent may be more.
    let known = "{msg} [{bar:30}] {binary_bytes} of about {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let unknown = "{spinner} {msg} {binary_bytes}, {binary_bytes_per_sec} ({elapsed})";
    bar.set_style(style(if total.is_some() { known } else { unknown }));
    bar.set_message(what.into());
    bar
}

fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_templates_are_sound() {
        for total in [None, Some(5)] {
            super::bytes("x", total).finish_and_clear();
        }
        for template in ["{spinner} {msg} ({elapsed})", "[{bar:30}] {binary_bytes} {binary_total_bytes} {eta}"] {
            indicatif::ProgressStyle::with_template(template).unwrap();
        }
    }
}
