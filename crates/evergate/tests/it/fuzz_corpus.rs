//! The fuzz targets' corpora (`fuzz/corpus`), fed to the same checks on every run: what fuzzing once found stays found.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

#[path = "../../../../fuzz/checks/mod.rs"]
mod checks;

/// Runs a check over every file of a corpus, which must have some; names the file that fails it.
#[track_caller]
fn feed(corpus: &str, check: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus").join(corpus);
    let mut files: Vec<_> = std::fs::read_dir(&folder).expect("a corpus").map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(files.len() >= 9, "only {} files in {corpus}", files.len());
    for file in files {
        let bytes = std::fs::read(&file).unwrap();
        let checked = catch_unwind(AssertUnwindSafe(|| check(&bytes)));
        assert!(checked.is_ok(), "{} fails its check, see above", file.display());
    }
}

#[test]
fn heads_and_chunks_are_what_the_library_takes() {
    feed("head", checks::head::check);
}

#[test]
fn request_bodies_are_what_a_tree_says() {
    feed("request", checks::request::check);
}

#[test]
fn streams_are_the_same_however_they_are_cut() {
    feed("sse", checks::sse::check);
}

#[test]
fn configurations_load_again_from_what_they_came_to() {
    feed("config", checks::config::check);
}

#[test]
fn records_are_lines_of_json_that_fit_a_pipe() {
    feed("record", checks::record::check);
}
