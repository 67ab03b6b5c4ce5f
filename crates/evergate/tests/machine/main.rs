//! What needs a machine that allows it: a memory or a freezer cgroup, namespaces, a mount, systemd's own checker. Each case says by
//! itself whether it can run here; one that cannot is reported as ignored, which `./test` holds against tests/skips.txt.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::exit, clippy::indexing_slicing)]

mod disk;
mod groups;
mod kernel;
mod memory;
mod packaging;
mod pid_one;
mod ports;
mod strangers;

use evergate_testkit::cases::{self, Case};

const CASES: [Case; 16] = [
    ("j3_more_large_bodies_than_there_is_memory_for_end_no_worker", memory::large_bodies_end_no_worker),
    ("d6_no_free_port_is_overload", ports::none_free_is_overload),
    ("s04_a_killed_worker_that_hangs_in_the_kernel_is_succeeded", kernel::a_killed_worker_is_succeeded),
    ("s21_a_stop_does_not_wait_for_who_hangs_in_the_kernel", kernel::a_stop_does_not_wait),
    ("s04_a_killed_clerk_that_hangs_in_the_kernel_is_succeeded", kernel::a_killed_clerk_is_succeeded),
    ("g5_a_memory_kill_of_a_program_is_told_from_others", groups::memory_kills_are_told_from_others),
    ("g10_cgroups_of_programs_go_with_their_hosts", groups::folders_go_with_their_hosts),
    ("g10_where_no_cgroup_may_be_made_programs_run_without", groups::where_it_may_not),
    ("s01_workers_are_replaced_while_the_disk_of_the_state_folder_hangs", disk::everything_else_goes_on),
    ("s21_a_stop_does_not_wait_for_a_disk_that_hangs", disk::a_stop_does_not_wait),
    ("s10_a_memory_kill_is_told_from_an_operators_twenty_of_twenty", memory::twenty_of_twenty),
    ("s10_a_stranger_in_the_cgroup_makes_it_a_suspicion", memory::a_stranger_makes_it_a_suspicion),
    ("s10_without_a_counter_nothing_is_guessed", memory::nothing_is_guessed),
    ("s11_process_one_needs_no_init", pid_one::needs_no_init),
    ("s31_another_user_is_not_listened_to", strangers::another_user_is_not_listened_to),
    ("s30_unit_files_are_valid", packaging::unit_files_are_valid),
];

fn main() {
    cases::run(&CASES);
}

/// The binary under test.
const EXE: &str = env!("CARGO_BIN_EXE_evergate");

/// Nothing here takes so long unless it is broken.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// Whether this command succeeds.
fn can(program: &str, args: &[&str]) -> bool {
    let mut command = std::process::Command::new(program);
    command.args(args).stdin(std::process::Stdio::null()).output().is_ok_and(|output| output.status.success())
}
