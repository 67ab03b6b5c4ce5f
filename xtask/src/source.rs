//! Just enough of Rust's surface to look for words in code: without comments, strings and test-only items.
//!
//! Not a parser. Line numbers are kept: what is taken out is replaced by spaces.

/// Code with comments and the contents of strings and character literals blanked.
pub fn code(text: &str) -> String {
    let mut out = Blanked { rest: text, out: String::with_capacity(text.len()) };
    let mut previous = ' ';
    while let Some(c) = out.rest.chars().next() {
        let rest = out.rest;
        if rest.starts_with("//") {
            out.blank(rest.find('\n').unwrap_or(rest.len()));
        } else if rest.starts_with("/*") {
            out.blank(block_comment(rest));
        } else if let Some(length) = raw_string(rest).filter(|_| !is_word(previous)) {
            out.blank(length);
        } else if c == '"' {
            out.blank(string(rest));
        } else if c == '\'' {
            match character(rest) {
                Some(length) => out.blank(length),
                None => out.keep(c),
            }
        } else {
            out.keep(c);
        }
        previous = c;
    }
    out.out
}

struct Blanked<'a> {
    rest: &'a str,
    out: String,
}

impl Blanked<'_> {
    fn keep(&mut self, c: char) {
        self.out.push(c);
        self.rest = self.rest.get(c.len_utf8()..).unwrap_or_default();
    }

    fn blank(&mut self, length: usize) {
        let (gone, rest) = self.rest.split_at_checked(length).unwrap_or((self.rest, ""));
        self.out.extend(gone.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        self.rest = rest;
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length of the (nested) block comment that `rest` starts with.
fn block_comment(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while let Some(tail) = rest.get(at..).filter(|tail| !tail.is_empty()) {
        if tail.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with("*/") {
            depth = depth.saturating_sub(1);
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += tail.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// Length of the raw string (`r"…"`, `br#"…"#`) that `rest` starts with.
fn raw_string(rest: &str) -> Option<usize> {
    let tail = rest.strip_prefix('b').or_else(|| rest.strip_prefix('c')).unwrap_or(rest).strip_prefix('r')?;
    let hashes = tail.bytes().take_while(|byte| *byte == b'#').count();
    let body = tail.get(hashes..)?.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let start = rest.len() - body.len();
    Some(body.find(&end).map_or(rest.len(), |at| start + at + end.len()))
}

/// Length of the string that `rest` starts with.
fn string(rest: &str) -> usize {
    let mut is_escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Length of the character literal that `rest` starts with; `None` when it is a lifetime.
fn character(rest: &str) -> Option<usize> {
    let mut chars = rest.char_indices().skip(1);
    let (_, first) = chars.next()?;
    if first == '\\' {
        chars.next()?;
        return chars.find(|(_, c)| *c == '\'').map(|(at, _)| at + 1);
    }
    chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at + 1)
}

/// Blanks every item behind `#[cfg(test)]` in what [`code`] gave.
pub fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some((before, behind)) = rest.split_once(MARK) {
        out.push_str(before);
        let length = item(behind);
        let gone = rest.get(before.len()..before.len() + MARK.len() + length).unwrap_or_default();
        out.extend(gone.chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = behind.get(length..).unwrap_or_default();
    }
    out.push_str(rest);
    out
}

/// Names of the modules that stand in other files and are compiled for tests only.
pub fn test_modules(code: &str) -> Vec<&str> {
    let declarations = code.split("#[cfg(test)]").skip(1).filter_map(|behind| behind.get(..item(behind)));
    declarations
        .filter_map(|text| text.trim().strip_suffix(';')?.rsplit_once("mod ").map(|(_, name)| name.trim()))
        .collect()
}

/// Length of the item that `text` starts with: to its closing brace, or to a semicolon or comma before any brace.
fn item(text: &str) -> usize {
    let mut depth = 0_usize;
    for (at, c) in text.char_indices() {
        match c {
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth = depth.saturating_sub(1);
                if depth == 0 && c == '}' {
                    return at + 1;
                }
            }
            ';' | ',' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The full paths that the code's `use` declarations name, each with its line (from 1).
pub fn uses(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let before = code.get(..at).unwrap_or_default();
        if before.chars().next_back().is_some_and(is_word) {
            continue;
        }
        let line = before.matches('\n').count() + 1;
        let declaration = code.get(at + 4..).and_then(|tail| tail.split(';').next()).unwrap_or_default();
        let tree: String = declaration.chars().filter(|c| !c.is_whitespace()).collect();
        let mut paths = Vec::new();
        flatten("", &tree, &mut paths);
        found.extend(paths.into_iter().map(|path| (line, path)));
    }
    found
}

/// `a::{b,c::{d}}` as `a::b` and `a::c::d`.
fn flatten(prefix: &str, tree: &str, paths: &mut Vec<String>) {
    // Nested deeper than any sane declaration: whatever this is, it is not one.
    if prefix.len() > 512 {
        return;
    }
    let Some((head, group)) = tree.split_once('{') else {
        paths.push(format!("{prefix}{tree}"));
        return;
    };
    let prefix = format!("{prefix}{head}");
    let group = group.strip_suffix('}').unwrap_or(group);
    let mut depth = 0_usize;
    let mut start = 0;
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                flatten(&prefix, group.get(start..at).unwrap_or_default(), paths);
                start = at + 1;
            }
            _ => {}
        }
    }
    flatten(&prefix, group.get(start..).unwrap_or_default(), paths);
}

/// Lines (from 1) on which `word` stands by itself; `word` may be a path or a macro's name with its `!`.
pub fn lines_with(code: &str, word: &str) -> Vec<usize> {
    let hit = |line: &str| {
        line.match_indices(word).any(|(at, _)| {
            let before = line.get(..at).and_then(|text| text.chars().next_back());
            let behind = line.get(at + word.len()..).and_then(|text| text.chars().next());
            let is_longer = behind.is_some_and(is_word) && word.ends_with(is_word);
            !is_longer && !before.is_some_and(is_word)
        })
    };
    code.lines().enumerate().filter(|(_, line)| hit(line)).map(|(at, _)| at + 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_hide_words() {
        let text = "let a = \"unsafe \\\" unsafe\"; // unsafe\n/* unsafe /* unsafe */ unsafe */ let b = r#\"unsafe\"#;\nlet c: &'a str = 'u'; unsafe {}";
        assert_eq!(lines_with(&code(text), "unsafe"), [3]);
    }

    #[test]
    fn a_quote_as_a_character_does_not_open_a_string() {
        assert_eq!(lines_with(&code("let q = '\"'; unsafe {}\nlet e = '\\''; unsafe {}"), "unsafe"), [1, 2]);
    }

    #[test]
    fn words_are_whole() {
        assert_eq!(lines_with("#![forbid(unsafe_code)]\neprintln!()\nprintln!()", "unsafe"), [0_usize; 0]);
        assert_eq!(lines_with("eprintln!()\nprintln!()", "println!"), [2]);
    }

    #[test]
    fn items_of_tests_are_left_out() {
        let text =
            code("fn a() {}\n#[cfg(test)]\nmod tests { fn b() { unsafe {} } }\n#[cfg(test)]\nmod sim;\nfn c() {}\n");
        let kept = without_tests(&text);
        assert!(!kept.contains("unsafe") && kept.contains("fn a") && kept.contains("fn c"));
        assert_eq!(kept.lines().count(), text.lines().count());
        assert_eq!(test_modules(&text), ["sim"]);
    }

    #[test]
    fn grouped_uses_are_spread_out() {
        let paths: Vec<String> =
            uses("use std::{fs, io::{self, Read}};\nlet reuse = 1;").into_iter().map(|(_, path)| path).collect();
        assert_eq!(paths, ["std::fs", "std::io::self", "std::io::Read"]);
    }
}
