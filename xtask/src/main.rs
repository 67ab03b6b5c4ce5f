//! Developer commands: `cargo xtask arrows | tidy | bench`.
#![forbid(unsafe_code)]

mod arrows;
#[cfg(feature = "bench")]
mod bench;
mod source;
mod tidy;
mod tree;

#[cfg(not(feature = "bench"))]
use std::process::Command;
use std::process::ExitCode;

const USAGE: &str = "usage: cargo xtask COMMAND
  arrows   checks the crates against the table of rooms in DESIGN.md section 3
  tidy     checks file lengths, TODOs, machine paths, trailing whitespace and links in the documents
  bench    compares Evergate with direct, nginx and a bare hyper proxy; `cargo xtask bench --help` has the options";

// Evergate's allocator, so that the bare proxy differs in what it does and not in what it is built on.
#[cfg(feature = "bench")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (command, rest) = arguments.split_first().map_or(("", [].as_slice()), |(first, rest)| (first.as_str(), rest));
    match command {
        "arrows" => report("arrows", arrows::check()),
        "tidy" => report("tidy", tidy::check()),
        "bench" => bench(rest),
        #[cfg(feature = "bench")]
        "bench-mock" | "bench-proxy" | "bench-kept" => bench::child(command, rest),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(64)
        }
    }
}

/// Prints what was found, one mistake a line, and gives the exit code.
fn report(what: &str, found: Result<Vec<String>, String>) -> ExitCode {
    match found {
        Ok(found) if found.is_empty() => {
            eprintln!("{what}: nothing to object to");
            ExitCode::SUCCESS
        }
        Ok(found) => {
            for line in &found {
                eprintln!("{line}");
            }
            eprintln!("{what}: {} mistake(s)", found.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{what}: could not be checked: {error}");
            ExitCode::from(70)
        }
    }
}

#[cfg(feature = "bench")]
fn bench(arguments: &[String]) -> ExitCode {
    bench::run(arguments)
}

/// Builds the same program again, optimised and with the bench in it, and runs that.
#[cfg(not(feature = "bench"))]
fn bench(arguments: &[String]) -> ExitCode {
    let status = Command::new(tree::cargo())
        .args(["run", "--release", "--quiet", "--package", "xtask", "--features", "bench", "--", "bench"])
        .args(arguments)
        .status();
    match status {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("bench: cannot run cargo: {error}");
            ExitCode::from(71)
        }
    }
}
