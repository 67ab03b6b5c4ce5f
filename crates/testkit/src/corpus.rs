//! Hostile inputs as data: text files that a person can read, with escapes, each input beside what must come of it.
//!
//! A line is one of these; `\` at an escape is a real backslash:
//!
//! ```text
//! # a remark, until the next blank line or input
//! ## a title for what follows
//! => what must come of the inputs below, in the reader's own words
//! let NAME = TEXT         `\{NAME}` stands for it in every frame and input below
//! frame BEFORE@AFTER      puts each input below where the `@` is; `frame @` ends that
//! - one input
//! ```
//!
//! Escapes: `\r \n \t \0 \s` (a blank) `\\ \@ \)`, `\xNN` (a byte), `\uNNNN` stays as it is (JSON's own), `\*N(...)` (N times
//! what is in the brackets), `\/` (a border between two writes), `\"`, as JSON has it, stays too.

/// One input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its line in the file, from 1.
    pub line: usize,
    /// The title it stands under.
    pub title: String,
    /// What must come of it.
    pub expect: String,
    /// Its bytes, in the pieces they are written in.
    pub pieces: Vec<Vec<u8>>,
}

impl Case {
    /// All bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.pieces.concat()
    }

    /// For a message: where it stands, and how it begins.
    #[must_use]
    pub fn shown(&self) -> String {
        let bytes = self.bytes();
        let start = &bytes[..bytes.len().min(200)];
        format!("line {} ({}): \"{}\"", self.line, self.title, start.escape_ascii())
    }
}

/// Reads a file's text.
///
/// # Panics
/// When a line is none of the kinds above, or an input has no expectation, or stands there twice.
#[must_use]
pub fn parse(text: &str) -> Vec<Case> {
    let (mut title, mut expect, mut frame) = (String::new(), String::new(), None);
    let (mut cases, mut names): (Vec<Case>, Vec<(String, String)>) = (Vec::new(), Vec::new());
    for (at, line) in text.lines().enumerate() {
        let number = at + 1;
        if let Some(rest) = line.strip_prefix("## ") {
            title = rest.to_owned();
            (expect, frame) = (String::new(), None);
        } else if let Some(rest) = line.strip_prefix("=> ") {
            expect = rest.to_owned();
        } else if let Some(rest) = line.strip_prefix("let ") {
            let (name, text) = rest.split_once(" = ").unwrap_or_else(|| panic!("line {number}: let NAME = TEXT"));
            names.push((format!("\\{{{name}}}"), text.to_owned()));
        } else if let Some(rest) = line.strip_prefix("frame ") {
            frame = Some(rest.to_owned());
        } else if let Some(rest) = line.strip_prefix("- ") {
            assert!(!expect.is_empty(), "line {number}: nothing says what must come of it");
            let whole = frame.as_deref().map_or_else(|| rest.to_owned(), |frame| within(frame, rest));
            let whole = names.iter().fold(whole, |whole, (name, text)| whole.replace(name, text));
            let pieces = unescape(&whole).unwrap_or_else(|wrong| panic!("line {number}: {wrong}"));
            cases.push(Case { line: number, title: title.clone(), expect: expect.clone(), pieces });
        } else {
            assert!(line.is_empty() || line.starts_with('#'), "line {number}: what is {line:?}?");
        }
    }
    let mut known = std::collections::HashMap::new();
    for case in &cases {
        if let Some(before) = known.insert(&case.pieces, case.line) {
            panic!("line {}: the same input as in line {before}", case.line);
        }
    }
    cases
}

/// Puts an input into its frame.
fn within(frame: &str, input: &str) -> String {
    match frame.split_once('@') {
        Some((before, after)) => format!("{before}{input}{after}"),
        None => panic!("a frame without a place for its input: {frame:?}"),
    }
}

/// Resolves a line's escapes.
fn unescape(text: &str) -> Result<Vec<Vec<u8>>, String> {
    let mut rest = text.as_bytes();
    let pieces = pieces(&mut rest, false)?;
    Ok(pieces)
}

/// Reads to the end, or to the bracket that closes a repetition.
fn pieces(rest: &mut &[u8], is_inner: bool) -> Result<Vec<Vec<u8>>, String> {
    let mut pieces = vec![Vec::new()];
    loop {
        let Some((&byte, after)) = rest.split_first() else {
            return if is_inner { Err("a repetition without its end".into()) } else { Ok(pieces) };
        };
        *rest = after;
        let last = pieces.len() - 1;
        if byte == b')' && is_inner {
            return Ok(pieces);
        }
        if byte != b'\\' {
            pieces[last].push(byte);
            continue;
        }
        let (&kind, after) = rest.split_first().ok_or("a backslash at the end")?;
        *rest = after;
        match kind {
            b'r' => pieces[last].push(b'\r'),
            b'n' => pieces[last].push(b'\n'),
            b't' => pieces[last].push(b'\t'),
            b'0' => pieces[last].push(0),
            b's' => pieces[last].push(b' '),
            b'\\' | b'@' | b')' => pieces[last].push(kind),
            b'u' | b'"' => pieces[last].extend([b'\\', kind]),
            b'x' => {
                let digits = rest.get(..2).and_then(|two| std::str::from_utf8(two).ok()).ok_or("\\x without digits")?;
                pieces[last].push(u8::from_str_radix(digits, 16).map_err(|_| format!("\\x{digits}"))?);
                *rest = &rest[2..];
            }
            b'/' => pieces.push(Vec::new()),
            b'*' => {
                let times = repetition(rest)?;
                let inner = self::pieces(rest, true)?;
                for _ in 0..times {
                    // Borders inside are repeated with the rest.
                    let (first, more) = inner.split_first().ok_or("an empty repetition")?;
                    if let Some(last) = pieces.last_mut() {
                        last.extend_from_slice(first);
                    }
                    pieces.extend_from_slice(more);
                }
            }
            other => return Err(format!("an unknown escape: \\{}", char::from(other))),
        }
    }
}

/// The count of `\*N(`.
fn repetition(rest: &mut &[u8]) -> Result<usize, String> {
    let digits = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let count = std::str::from_utf8(&rest[..digits]).ok().and_then(|text| text.parse().ok());
    let count = count.ok_or("a repetition without its count")?;
    *rest = rest[digits..].strip_prefix(b"(").ok_or("a repetition without its bracket")?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_its_inputs_with_what_they_stand_under() {
        let text = "# words\n## One\n=> 400\nframe A@\\r\\n\n- \\x41\\u0041\n- \\*2(ab\\s)c\n=> 200\nframe @\nlet z = \\x7a\n- x\\/y\\{z}\\\\\n";
        let cases = parse(text);
        let bytes: Vec<Vec<u8>> = cases.iter().map(Case::bytes).collect();
        assert_eq!(bytes, [&b"AA\\u0041\r\n"[..], b"Aab ab c\r\n", b"xyz\\"]);
        assert_eq!((cases[0].expect.as_str(), cases[2].expect.as_str()), ("400", "200"));
        assert_eq!((cases[2].title.as_str(), cases[2].pieces.len(), cases[2].line), ("One", 2, 10));
    }

    #[test]
    #[should_panic(expected = "the same input as in line 2")]
    fn an_input_counts_once() {
        let _ = parse("=> 400\n- a\n- \\x61\n");
    }
}
