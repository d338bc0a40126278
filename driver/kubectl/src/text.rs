//! What people read: tables, trees, sizes, times.

mod table;
mod tree;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

pub(crate) use table::table;
pub(crate) use tree::draw;

const UNITS: [(&str, u64); 4] = [("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];

/// A size with at most one digit behind the point: `1.4Gi`, `10Gi`, `512`.
pub(crate) fn size(bytes: u64) -> String {
    let Some((unit, one)) = UNITS.iter().find(|(_, one)| bytes >= *one) else { return bytes.to_string() };
    let tenths = (u128::from(bytes) * 10 + u128::from(one / 2)) / u128::from(*one);
    if tenths % 10 == 0 { format!("{}{unit}", tenths / 10) } else { format!("{}.{}{unit}", tenths / 10, tenths % 10) }
}

/// A time, to the second.
pub(crate) fn when(time: &Time) -> String {
    // Seconds are all that Kubernetes keeps.
    time.0.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What is there, or a dash.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.into() }
}

/// Text from a guest or an object, on one line and without what a terminal would act on.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short_and_rounded_to_the_nearest() {
        for (bytes, want) in [
            (0, "0"),
            (1023, "1023"),
            (1 << 30, "1Gi"),
            ((1 << 30) + (1 << 29), "1.5Gi"),
            (10 << 40, "10Ti"),
            ((1 << 20) + 1, "1Mi"),
            (u64::MAX, "16777216Ti"),
        ] {
            assert_eq!(size(bytes), want);
        }
    }
}
