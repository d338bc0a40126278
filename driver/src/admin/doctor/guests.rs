use zpod_admin::Check;

use crate::volumes::{CLAIM_NAME, CLAIM_NAMESPACE, Look, Observed, condition_of};

/// More volumes with something wrong than this are counted only.
const NAMED: usize = 50;

pub(super) fn checks(looks: &[Look], node: &str) -> Vec<Check> {
    let mut checks = Vec::new();
    let silent: Vec<_> = looks.iter().filter(|look| look.heard.is_none()).map(|look| name(&look.volume)).collect();
    checks.push(match silent.as_slice() {
        [] => Check::ok("guests", format!("the guests of all {} published volumes are heard", looks.len())),
        some => Check::warn(
            "guests",
            format!("no guest is heard for {} of {} published volumes: {}", some.len(), looks.len(), list(some)),
            format!(
                "a guest that starts is heard within a minute; else see whether its pod runs (kubectl get pods -A \
                 --field-selector spec.nodeName={node}), has a zpod RuntimeClass, and what the runtime's log says"
            ),
        ),
    });
    let mut sick = 0;
    for look in looks {
        let Some((sandbox, report)) = &look.heard else { continue };
        let condition = condition_of(report);
        if !condition.abnormal {
            continue;
        }
        sick += 1;
        if sick <= NAMED {
            let message = format!("{} (sandbox {sandbox}): {}", name(&look.volume), condition.message);
            checks.push(Check::fail(
                "volume",
                message,
                "`kubectl zpod status` and the events of claim and pod say more",
            ));
        }
    }
    checks.push(match sick {
        0 => Check::ok("volumes", format!("{} are published, none with a problem", looks.len())),
        some => Check::fail("volumes", format!("{some} of {} have a problem", looks.len()), "see each of them"),
    });
    checks
}

/// Claim and id: people know the one, logs the other.
fn name(volume: &Observed) -> String {
    let (namespace, claim) = (volume.label(CLAIM_NAMESPACE), volume.label(CLAIM_NAME));
    if claim.is_empty() { volume.id.to_string() } else { format!("{namespace}/{claim} ({})", volume.id) }
}

fn list(names: &[String]) -> String {
    let more = names.len().saturating_sub(NAMED);
    let shown = names.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Health, VolumeReport};
    use std::sync::Arc;
    use zpod_admin::Level;
    use zpod_volume::{Bytes, VolumeId};

    fn look(claim: &str, health: Option<Health>) -> Look {
        let id = VolumeId::from_name(claim);
        let labels = [(CLAIM_NAME, claim), (CLAIM_NAMESPACE, "prod")].map(|(key, value)| (key.into(), value.into()));
        let volume = Observed { id, target: "/t".into(), pod: None, labels: labels.into(), capacity: Bytes::gib(1) };
        let heard = health.map(|health| ("s".to_owned(), VolumeReport { health, ..VolumeReport::online(id) }));
        Look { volume: Arc::new(volume), heard }
    }

    #[test]
    fn silent_guests_and_sick_volumes_are_named() {
        let all = [look("a", Some(Health::Online)), look("b", None), look("c", Some(Health::Suspended))];
        let checks = checks(&all, "n1");
        let levels: Vec<_> = checks.iter().map(|check| (check.name.as_str(), check.level)).collect();
        assert_eq!(levels, [("guests", Level::Warn), ("volume", Level::Fail), ("volumes", Level::Fail)]);
        assert!(checks[0].message.contains("prod/b ("), "{checks:?}");
        assert!(checks[0].remedy.contains("spec.nodeName=n1"), "{checks:?}");
        assert!(checks[1].message.contains("prod/c (") && checks[1].message.contains("suspended"), "{checks:?}");
    }

    #[test]
    fn a_quiet_node_is_said_to_be_well() {
        let checks = checks(&[], "n1");
        assert!(checks.iter().all(|check| check.level == Level::Ok), "{checks:?}");
    }
}
