//! The whole master with real processes. The master executes its own program for every child, so this test is that
//! program: by its first argument it plays `serve`, `compile`, `worker` and `clerk`, and without one it drives them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::exit, clippy::indexing_slicing)]

mod cases;
mod causes;
mod drive;
mod life;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("serve") => std::process::exit(life::serve(&args[1..]).into()),
        Some("compile") => life::compile(&args[1..]),
        Some("worker") => life::worker(&args[1..]),
        Some("clerk") => life::clerk(&args[1..]),
        Some("--list") => {}
        // What `cargo test` was given as a filter, or nothing.
        filter => cases::run(filter.filter(|text| !text.starts_with('-'))),
    }
}
