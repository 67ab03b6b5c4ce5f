//! What a reader would stumble over: long files, TODOs nobody tracks, paths of one machine, stray blanks, dead links.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use crate::tree;

/// DESIGN.md section 3 asks for less than 400; beyond this a file has more than one subject for certain.
const LINES_MAX: usize = 700;

/// Endings of the files that people write as code.
const CODE: [&str; 7] = [".rs", ".sh", ".py", ".mjs", ".js", ".toml", ".yml"];

/// Starts of paths that exist on one machine only; taken apart so that this file is not its own finding.
const MACHINE: [&str; 3] = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];

/// Made by tools: their lines are not ours to tidy.
const GENERATED: [&str; 2] = ["Cargo.lock", "package-lock.json"];

/// Every finding as `file:line: what`.
///
/// # Errors
/// When git or a file cannot be read.
pub fn check() -> Result<Vec<String>, String> {
    let root = tree::root()?;
    let files = tree::files(&root)?;
    let mut found = Vec::new();
    let (mut promised, mut held) = (BTreeSet::new(), BTreeSet::new());
    for name in &files {
        let Some(text) = tree::text(&root, name)? else { continue };
        found.extend(machine_paths(name, &text));
        if GENERATED.iter().any(|generated| name.ends_with(generated)) {
            continue;
        }
        // Inputs are the bytes they are.
        if !name.starts_with("fuzz/corpus/") {
            found.extend(trailing_blanks(name, &text));
        }
        if name == "ARCHITECTURE.md" {
            promised.extend(invariants(&text));
        } else if name.starts_with("crates/") && name.ends_with(".rs") {
            held.extend(invariants(&text));
        }
        if is_code(name, &text) {
            found.extend(length(name, &text));
            found.extend(todos(name, &text));
        }
        if name.ends_with(".md") {
            found.extend(dead_links(name, &text, &|target| root.join(target).exists()));
        }
    }
    let nowhere = promised.difference(&held).map(|id| format!("ARCHITECTURE.md: no source says that it holds {id}"));
    let unknown = held.difference(&promised).map(|id| format!("{id}: held, but ARCHITECTURE.md does not list it"));
    found.extend(nowhere.chain(unknown));
    Ok(found)
}

/// Ids of invariants, such as `INV-EXIT-1`, that a text names.
fn invariants(text: &str) -> BTreeSet<String> {
    let is_part = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '-';
    let ids = text.match_indices(concat!("IN", "V-")).filter_map(|(at, _)| {
        let id = text.get(at..)?.split(|c| !is_part(c)).next()?;
        id.ends_with(|c: char| c.is_ascii_digit()).then(|| id.to_owned())
    });
    ids.collect()
}

fn is_code(name: &str, text: &str) -> bool {
    CODE.iter().any(|ending| name.ends_with(ending)) || text.starts_with("#!/")
}

/// The lines that `hit` says yes to, from 1.
fn lines(name: &str, text: &str, what: &str, hit: impl Fn(&str) -> bool) -> Vec<String> {
    let hits = text.lines().enumerate().filter(|(_, line)| hit(line));
    hits.map(|(at, _)| format!("{name}:{}: {what}", at + 1)).collect()
}

fn length(name: &str, text: &str) -> Option<String> {
    let count = text.lines().count();
    (count > LINES_MAX).then(|| format!("{name}:{count}: over {LINES_MAX} lines; which are its subjects?"))
}

fn todos(name: &str, text: &str) -> Vec<String> {
    lines(name, text, "a note to do something carries an issue's number: `TODO(#12)`", |line| {
        [concat!("TO", "DO"), concat!("FIX", "ME")].iter().any(|word| {
            line.match_indices(word).any(|(at, _)| {
                let before = line.get(..at).and_then(|text| text.chars().next_back());
                let behind = line.get(at + word.len()..).unwrap_or_default();
                let is_part = |c: char| c.is_alphanumeric() || c == '_';
                let is_whole = !before.is_some_and(is_part) && !behind.starts_with(is_part);
                is_whole
                    && !behind.strip_prefix("(#").is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            })
        })
    })
}

fn machine_paths(name: &str, text: &str) -> Vec<String> {
    lines(name, text, "a path of one machine", |line| {
        MACHINE.iter().any(|path| {
            // `docs/work/plan.md` and `https://host/home/` are no absolute paths.
            line.match_indices(path).any(|(at, _)| {
                let before = line.get(..at).and_then(|text| text.chars().next_back());
                !before.is_some_and(|c| c.is_alphanumeric() || "._-~})*".contains(c))
            })
        })
    })
}

fn trailing_blanks(name: &str, text: &str) -> Vec<String> {
    lines(name, text, "blanks at the end of the line", |line| line.ends_with([' ', '\t', '\r']))
}

/// Links of a document to files that are not there. `exists` gets a path relative to the repository's root.
fn dead_links(name: &str, text: &str, exists: &dyn Fn(&Path) -> bool) -> Vec<String> {
    let folder = Path::new(name).parent().unwrap_or(Path::new(""));
    let mut found = Vec::new();
    let mut is_fenced = false;
    for (at, line) in text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            is_fenced = !is_fenced;
        }
        if is_fenced {
            continue;
        }
        for target in targets(line) {
            if !resolve(folder, target).is_some_and(|path| exists(&path)) {
                found.push(format!("{name}:{}: the link to {target} leads nowhere", at + 1));
            }
        }
    }
    found
}

/// The files that a line of Markdown links to: `[text](target)`, without addresses and anchors of the same page.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|tail| {
        let target = tail.split([')', ' ']).next()?;
        let path = target.split('#').next()?.trim_matches(['<', '>']);
        (!path.is_empty() && !path.contains("://") && !path.starts_with("mailto:")).then_some(path)
    })
}

/// A link's path from the root, `..` taken out; `None` when it leaves the repository.
fn resolve(folder: &Path, target: &str) -> Option<PathBuf> {
    let joined = target.strip_prefix('/').map_or_else(|| folder.join(target), PathBuf::from);
    let mut path = PathBuf::new();
    for part in joined.components() {
        match part {
            Component::ParentDir if path.pop() => {}
            Component::ParentDir => return None,
            Component::Normal(part) => path.push(part),
            _ => {}
        }
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invariants_are_found_by_their_ids() {
        let found = invariants(concat!("| IN", "V-EXIT-1 | (IN", "V-STEP-22). IN", "V-* IN", "V-X"));
        assert_eq!(found.into_iter().collect::<Vec<_>>(), [concat!("IN", "V-EXIT-1"), concat!("IN", "V-STEP-22")]);
    }

    #[test]
    fn a_long_file_is_named() {
        assert!(length("a.rs", &"x\n".repeat(LINES_MAX)).is_none());
        assert!(length("a.rs", &"x\n".repeat(LINES_MAX + 1)).is_some());
    }

    #[test]
    fn a_note_needs_an_issue() {
        let word = concat!("TO", "DO");
        assert_eq!(todos("a.rs", &format!("// {word}: later\n// {word}(#7): later\n// {word}S\n")).len(), 1);
    }

    #[test]
    fn machine_paths_are_found_and_lookalikes_are_not() {
        for path in MACHINE {
            assert_eq!(machine_paths("a.md", &format!("see `{path}x`\n")).len(), 1);
            assert_eq!(machine_paths("a.md", &format!("see docs{path}x and $HOME{path}x\n")).len(), 0);
        }
    }

    #[test]
    fn blanks_at_the_end_are_found() {
        assert_eq!(trailing_blanks("a", "a \nb\nc\t\n").len(), 2);
    }

    #[test]
    fn links_are_followed_from_the_document() {
        let text = "[a](../README.md#x) [b](gone.md) [c](https://x.y/z) [d](#here)\n```\n[e](gone.md)\n```\n[f](../../out.md)\n";
        let found = dead_links("docs/a.md", text, &|path| path == Path::new("README.md"));
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[0].starts_with("docs/a.md:1: ") && found[1].starts_with("docs/a.md:5: "));
    }
}
