use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;

/// What a node says of a volume or a snapshot besides its record, for people and for the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// The condition's type.
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// A word in CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

/// Sets a condition; its time changes only when it does.
pub(crate) fn set(conditions: &mut Vec<Condition>, remark: &Remark, generation: Option<i64>) {
    let status = if remark.holds { "True" } else { "False" };
    let existing = conditions.iter().position(|condition| condition.type_ == remark.kind);
    let since = existing
        .and_then(|index| conditions.get(index))
        .filter(|condition| condition.status == status)
        .map_or_else(|| Time(Timestamp::now()), |condition| condition.last_transition_time.clone());
    let condition = Condition {
        type_: remark.kind.to_owned(),
        status: status.to_owned(),
        reason: remark.reason.to_owned(),
        // metav1.Condition: at most 32768 characters.
        message: remark.message.chars().take(2048).collect(),
        last_transition_time: since,
        observed_generation: generation,
    };
    match existing.and_then(|index| conditions.get_mut(index)) {
        Some(place) => *place = condition,
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_keeps_its_time_until_it_changes() {
        let mut conditions = vec![];
        let remark = |holds| Remark { kind: "Ready", holds, reason: "A", message: "m".into() };
        set(&mut conditions, &remark(true), Some(1));
        let first = conditions.clone();
        set(&mut conditions, &remark(true), Some(2));
        assert_eq!(conditions.len(), 1);
        assert_eq!(conditions[0].last_transition_time, first[0].last_transition_time);
        assert_eq!(conditions[0].observed_generation, Some(2));
        set(&mut conditions, &remark(false), Some(2));
        assert_eq!(conditions[0].status, "False");
    }
}
