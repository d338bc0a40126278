use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zpod_volume::Bytes;

/// A number of bytes as Kubernetes writes it (`resource.Quantity`): `10Gi` where that is exact, else the plain number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(pub Bytes);

const UNITS: [(&str, u64); 4] = [("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];

impl Quantity {
    /// Rounded up to whole MiB: for numbers that are looked at and always change.
    pub fn rounded(bytes: Bytes) -> Self {
        Self(bytes.round_up(1 << 20))
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0.0;
        match UNITS.iter().find(|(_, size)| bytes >= *size && bytes.is_multiple_of(*size)) {
            Some((unit, size)) => write!(f, "{}{unit}", bytes / size),
            None => write!(f, "{bytes}"),
        }
    }
}

impl FromStr for Quantity {
    type Err = zpod_volume::ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl JsonSchema for Quantity {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // maxLength keeps the cost of CEL rules that parse it bounded.
        json_schema!({"type": "string", "pattern": "^[0-9]+(Ki|Mi|Gi|Ti)?$", "maxLength": 24})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_survive_the_way_there_and_back() {
        for (bytes, text) in [(0, "0"), (1, "1"), (1 << 30, "1Gi"), ((1 << 30) + 1, "1073741825"), (3 << 20, "3Mi")] {
            assert_eq!(Quantity(Bytes(bytes)).to_string(), text);
            assert_eq!(text.parse::<Quantity>().unwrap(), Quantity(Bytes(bytes)));
        }
    }
}
