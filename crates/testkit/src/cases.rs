//! A test program whose cases say by themselves whether they can run here. One that cannot is reported as ignored, with the
//! reason, which `./test` holds against tests/skips.txt.

/// A case is run, or says why it cannot be.
pub type Case = (&'static str, fn() -> Result<(), String>);

/// Runs those whose name holds the first argument, in the words of Rust's own test programs; ends the process with 101 when
/// one failed.
#[allow(clippy::exit, reason = "it is the main function of a test program")]
pub fn run(cases: &[Case]) {
    let filter = std::env::args().nth(1).filter(|text| !text.starts_with('-'));
    if std::env::args().any(|arg| arg == "--list") {
        return;
    }
    let chosen = cases.iter().filter(|(name, _)| filter.as_ref().is_none_or(|text| name.contains(text.as_str())));
    let (mut passed, mut failed, mut ignored) = (0, 0, 0);
    for (name, case) in chosen {
        match std::panic::catch_unwind(case) {
            Ok(Ok(())) => {
                println!("test {name} ... ok");
                passed += 1;
            }
            Ok(Err(why)) => {
                println!("test {name} ... ignored, {why}");
                ignored += 1;
            }
            Err(_) => {
                println!("test {name} ... FAILED");
                failed += 1;
            }
        }
    }
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {word}. {passed} passed; {failed} failed; {ignored} ignored");
    if failed > 0 {
        std::process::exit(101);
    }
}
