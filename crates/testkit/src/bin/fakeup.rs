//! The scripted upstream as a program, for tests that are not written in Rust.
//!
//! Prints `{"listen":"127.0.0.1:PORT"}` and serves until its standard input ends, so that it never outlives whoever
//! started it.
#![forbid(unsafe_code)]

use std::io::{Read, Write};

use evergate_testkit::FakeUpstream;

fn main() -> std::io::Result<()> {
    let upstream = FakeUpstream::start();
    writeln!(std::io::stdout(), "{{\"listen\":\"{}\"}}", upstream.address())?;
    let mut nothing = Vec::new();
    std::io::stdin().read_to_end(&mut nothing)?;
    Ok(())
}
