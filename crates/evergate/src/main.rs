//! The binary: everything is in the library, so that tests can reach it.
#![forbid(unsafe_code)]

use std::process::ExitCode;

/// Returns memory to the system after a burst, where the C library's allocator keeps it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    evergate::cli::main()
}
