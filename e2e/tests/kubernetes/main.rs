//! Scenarios on a real cluster: see `zpod_e2e::cluster`.
//!
//! A scenario is an `async fn(&Cluster) -> Result<()>` in a module of its own, and a line in `main`. All share one
//! cluster, which the first one starts, and run one after another: each leaves the cluster as it was.

mod access;
mod attributes;
mod block;
mod capacity;
mod chart;
mod claims;
mod encryption;
mod ephemeral;
mod growth;
mod kubectl;
mod manifests;
mod outage;
mod refusals;
mod restarts;
mod rollback;
mod running;
mod runtime;
mod smoke;
mod snapshots;
mod stage;
mod upgrades;
mod volume;

use std::process::ExitCode;

use anyhow::Result;
use libtest_mimic::Arguments;
use stage::Stage;

fn main() -> Result<ExitCode> {
    zpod_e2e::cluster::isolate()?;
    let stage = Stage::default();
    let trials = vec![
        stage.trial("a_pod_runs_and_its_log_can_be_read", smoke::a_pod_runs_and_its_log_can_be_read),
        stage.trial(
            "a_claim_waits_for_a_pod_and_keeps_its_data_for_the_next",
            volume::a_claim_waits_for_a_pod_and_keeps_its_data_for_the_next,
        ),
        stage.trial(
            "a_pod_on_another_runtime_is_told_what_to_write",
            refusals::a_pod_on_another_runtime_is_told_what_to_write,
        ),
        stage.trial(
            "a_pod_that_mounts_a_part_of_its_volume_is_told_which",
            refusals::a_pod_that_mounts_a_part_of_its_volume_is_told_which,
        ),
        stage.trial("a_burst_of_claims_outlives_the_controllers", restarts::a_burst_of_claims_outlives_the_controllers),
        stage.trial(
            "a_node_plugin_restarts_while_three_replicas_run",
            restarts::a_node_plugin_restarts_while_three_replicas_run,
        ),
        stage
            .trial("a_pod_that_is_not_root_writes_to_its_volume", running::a_pod_that_is_not_root_writes_to_its_volume),
        stage.trial(
            "a_volume_that_fills_is_told_of_on_its_claim_and_its_pod",
            running::a_volume_that_fills_is_told_of_on_its_claim_and_its_pod,
        ),
        stage.trial(
            "a_container_starts_again_in_its_place_beside_one_that_goes_on",
            runtime::a_container_starts_again_in_its_place_beside_one_that_goes_on,
        ),
        stage.trial(
            "a_volume_that_the_runtime_leaves_out_is_told_of_wherever_one_looks",
            runtime::a_volume_that_the_runtime_leaves_out_is_told_of_wherever_one_looks,
        ),
        stage.trial(
            "a_snapshot_of_a_running_pod_is_restored_larger_and_outlives_its_source",
            snapshots::a_snapshot_of_a_running_pod_is_restored_larger_and_outlives_its_source,
        ),
        stage.trial("a_claim_is_cloned_while_its_pod_runs", snapshots::a_claim_is_cloned_while_its_pod_runs),
        stage.trial(
            "a_group_is_taken_as_a_whole_and_goes_as_a_whole",
            snapshots::a_group_is_taken_as_a_whole_and_goes_as_a_whole,
        ),
        stage.trial(
            "a_running_pod_gets_the_attributes_of_another_class",
            attributes::a_running_pod_gets_the_attributes_of_another_class,
        ),
        stage.trial(
            "an_encrypted_volume_opens_with_its_tenants_secret_only",
            encryption::an_encrypted_volume_opens_with_its_tenants_secret_only,
        ),
        stage.trial(
            "a_block_volume_is_a_device_and_keeps_its_data",
            block::a_block_volume_is_a_device_and_keeps_its_data,
        ),
        stage.trial(
            "an_inline_volume_begins_and_ends_with_its_pod",
            ephemeral::an_inline_volume_begins_and_ends_with_its_pod,
        ),
        stage.trial(
            "a_growth_beyond_the_headroom_is_told_of_and_done_at_the_next_start",
            growth::a_growth_beyond_the_headroom_is_told_of_and_done_at_the_next_start,
        ),
        stage.trial(
            "a_volume_is_shown_changed_scrubbed_and_sent_by_kubectl",
            kubectl::a_volume_is_shown_changed_scrubbed_and_sent_by_kubectl,
        ),
        stage.trial(
            "a_pod_with_zfs_of_its_own_leaves_its_datasets_to_the_next",
            access::a_pod_with_zfs_of_its_own_leaves_its_datasets_to_the_next,
        ),
        stage.trial(
            "a_volume_goes_back_to_a_snapshot_with_its_next_pod",
            rollback::a_volume_goes_back_to_a_snapshot_with_its_next_pod,
        ),
        stage.trial("the_scheduler_goes_where_the_room_is", capacity::the_scheduler_goes_where_the_room_is),
        // After all that use the chart: it looks for what they were refused, and uninstalls it.
        stage.trial(
            "the_chart_is_installed_upgraded_and_uninstalled",
            chart::the_chart_is_installed_upgraded_and_uninstalled,
        ),
        stage.trial(
            "the_chart_is_upgraded_between_all_values_that_its_tests_accept",
            upgrades::the_chart_is_upgraded_between_all_values_that_its_tests_accept,
        ),
        stage.trial(
            "a_field_that_can_not_change_is_refused_before_anything_is_changed",
            upgrades::a_field_that_can_not_change_is_refused_before_anything_is_changed,
        ),
        stage.trial(
            "deleting_the_plain_manifests_takes_no_record",
            manifests::deleting_the_plain_manifests_takes_no_record,
        ),
        stage.trial(
            "a_record_that_was_deleted_by_hand_is_adopted",
            running::a_record_that_was_deleted_by_hand_is_adopted,
        ),
        // An API server that has just started refuses what it will grant a second later: after the look at refusals.
        stage.trial("a_pod_runs_on_whatever_happens_around_it", running::a_pod_runs_on_whatever_happens_around_it),
        stage.trial("the_snapshot_api_can_be_added", snapshots::the_snapshot_api_can_be_added),
        stage.trial("the_api_server_comes_back_with_what_it_knew", outage::the_api_server_comes_back_with_what_it_knew),
        stage.trial("a_killed_node_comes_back_with_its_name", outage::a_killed_node_comes_back_with_its_name),
    ];
    // On this thread: a node lives as long as the thread that started it.
    let conclusion = libtest_mimic::run(&Arguments { test_threads: Some(1), ..Arguments::from_args() }, trials);
    Ok(conclusion.exit_code())
}
