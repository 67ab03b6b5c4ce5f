//! `cargo xtask bench`: what Evergate costs, beside what stands in its place otherwise.
//!
//! Everything is compared within one run, interleaved, because the same program measured an hour apart on a shared
//! machine differs by more than what we look for. Ratios are taken pair by pair, then their median.

#![allow(clippy::disallowed_methods, reason = "tasks of single-threaded tools, which end with them")]

mod alone;
mod instructions;
mod load;
mod measure;
mod mock;
mod proc;
mod programs;
mod proxy;
mod report;
mod subject;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use rustix::process::{Resource, Rlimit};

const USAGE: &str = "usage: cargo xtask bench [OPTIONS]
  --pairs N        measure N times, interleaved, and take medians (default 9, at least 3)
  --quick          the same as --pairs 3
  --only PART      unary, streams, memory, pss, start or programs; may be repeated
  --one-cpu        mock, load and subject on one CPU: no wake-ups between CPUs in the figures
  --without-evergate   only what Evergate is compared with
  --instructions   count the worker's instructions under callgrind instead
  --check          exit 1 when a target is missed (with --instructions: on more than 5 % drift)
  --write          keep the result: docs/performance.md, or xtask/instructions.txt";

/// What was asked for.
#[derive(Debug)]
pub struct Options {
    pairs: usize,
    only: Vec<String>,
    has_evergate: bool,
    is_one_cpu: bool,
    is_instructions: bool,
    is_check: bool,
    is_write: bool,
    /// As typed, for the table's caption.
    typed: String,
}

impl Options {
    fn parse(arguments: &[String]) -> Result<Self, String> {
        let mut options = Self {
            pairs: 9,
            only: Vec::new(),
            has_evergate: true,
            is_one_cpu: false,
            is_instructions: false,
            is_check: false,
            is_write: false,
            typed: format!("cargo xtask bench {}", arguments.join(" ")).trim().into(),
        };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument.as_str() {
                "--pairs" => {
                    let pairs =
                        rest.next().and_then(|text| text.parse().ok()).filter(|pairs| (3..=999).contains(pairs));
                    options.pairs = pairs.ok_or("--pairs takes a number from 3 to 999")?;
                }
                "--quick" => options.pairs = 3,
                "--only" => {
                    let part = rest.next().filter(|part| measure::PARTS.contains(&part.as_str()));
                    options.only.push(part.ok_or_else(|| format!("--only takes one of {:?}", measure::PARTS))?.clone());
                }
                "--without-evergate" => options.has_evergate = false,
                "--one-cpu" => options.is_one_cpu = true,
                "--instructions" => options.is_instructions = true,
                "--check" => options.is_check = true,
                "--write" => options.is_write = true,
                _ => return Err(USAGE.into()),
            }
        }
        Ok(options)
    }

    fn wants(&self, part: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == part)
    }
}

/// Runs the bench; the exit code is 0 when it ran and, with `--check`, nothing was missed.
pub fn run(arguments: &[String]) -> ExitCode {
    let options = match Options::parse(arguments) {
        Ok(options) => options,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(64);
        }
    };
    match bench(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) if !options.is_check => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(70)
        }
    }
}

/// Whether nothing was missed.
fn bench(options: &Options) -> Result<bool, String> {
    let root = crate::tree::root()?;
    let evergate = build(options)?;
    raise_descriptors();
    subject::pin_load();
    let folder = tempfile::tempdir().map_err(|error| format!("temporary folder: {error}"))?;
    let mock = subject::start_mock()?;
    let cpu = if options.is_one_cpu { subject::LOAD_CPU } else { subject::SUBJECT_CPU };
    let place = subject::Place { folder: folder.path().into(), evergate, mock: mock.address, cpu };
    let result = local(async {
        if options.is_instructions {
            instructions::run(options, place, &root).await
        } else {
            if options.wants("programs") && options.has_evergate {
                programs::run(options, &place, &root).await?;
            }
            // Nothing else is asked for.
            if options.only.iter().all(|part| part == "programs") && !options.only.is_empty() {
                return Ok(true);
            }
            let samples = measure::run(options, &place).await?;
            report::show(options, &samples, &root)
        }
    });
    result.map_err(|error| {
        let words = subject::last_words(folder.path());
        if words.is_empty() { error } else { format!("{error}\nEvergate's last words:\n{words}") }
    })
}

/// Builds what is measured as a user would, and says where it is.
fn build(options: &Options) -> Result<PathBuf, String> {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| crate::tree::root().map(|root| root.join("target")), |path| Ok(path.into()))?;
    let evergate = target.join("release").join("evergate");
    if options.has_evergate {
        let status = Command::new(crate::tree::cargo())
            .args(["build", "--release", "--quiet", "--locked", "--package", "evergate"])
            .status();
        if !status.map_err(|error| format!("cargo build: {error}"))?.success() {
            return Err("evergate does not build; --without-evergate measures the others".into());
        }
    }
    Ok(evergate)
}

/// 2,000 held streams are 4,000 descriptors in whatever stands between; children inherit the limit.
fn raise_descriptors() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

/// Runs a future on this thread, with tasks that need not be `Send`.
fn local<T>(future: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("runtime: {error}"))?;
    tokio::task::LocalSet::new().block_on(&runtime, future)
}

/// The lives of this program's own servers: `bench-mock`, `bench-proxy UPSTREAM`, `bench-kept`.
pub fn child(command: &str, arguments: &[String]) -> ExitCode {
    // Whatever becomes of the bench, its servers do not outlive it.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    let upstream = arguments.first().and_then(|text| text.parse().ok());
    let result = match (command, upstream) {
        ("bench-mock", _) => local(mock::serve()),
        ("bench-kept", _) => programs::kept(),
        (_, Some(upstream)) => local(proxy::serve(upstream)),
        (_, None) => Err("bench-proxy takes its upstream's address".into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Tells the parent where a server listens.
fn announce(listener: &tokio::net::TcpListener) -> Result<(), String> {
    let address = listener.local_addr().map_err(|error| format!("local address: {error}"))?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "{address}").and_then(|()| out.flush()).map_err(|error| format!("standard output: {error}"))
}
