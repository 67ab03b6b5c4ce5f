//! What is wrong with a configuration, and where.

use std::cell::RefCell;
use std::fmt;

/// One thing an operator has to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file's name as the operator gave it, or the flag or variable that is wrong.
    pub source: String,
    /// Line in the file, from 1; 0 when the mistake is not in the file.
    pub line: usize,
    /// Column in characters, from 1; 0 when the mistake is not in the file.
    pub column: usize,
    /// What is wrong and what to do; never a secret's value.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line == 0 {
            return write!(f, "{}: {}", self.source, self.message);
        }
        write!(f, "{}:{}:{}: {}", self.source, self.line, self.column, self.message)
    }
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Byte offset in the file.
    Byte(usize),
    /// A command-line flag or an environment variable.
    Named(&'static str),
}

/// Collects every mistake and warning of one load; reading goes on after each.
pub(super) struct Report<'a> {
    name: &'a str,
    text: &'a str,
    mistakes: RefCell<Vec<Mistake>>,
    warnings: RefCell<Vec<String>>,
}

impl<'a> Report<'a> {
    pub(super) fn new(name: &'a str, text: &'a str) -> Self {
        Self { name, text, mistakes: RefCell::default(), warnings: RefCell::default() }
    }

    pub(super) fn mistake(&self, place: Place, message: impl Into<String>) {
        let mistake = self.at(place, message.into());
        self.mistakes.borrow_mut().push(mistake);
    }

    pub(super) fn warn(&self, place: Place, message: impl Into<String>) {
        let text = self.at(place, message.into()).to_string();
        self.warnings.borrow_mut().push(text);
    }

    /// The mistakes in the order of the file, those outside it last; the warnings when there are none.
    pub(super) fn finish(self) -> Result<Vec<String>, Vec<Mistake>> {
        let mut mistakes = self.mistakes.into_inner();
        if mistakes.is_empty() {
            return Ok(self.warnings.into_inner());
        }
        mistakes.sort_by_key(|mistake| (mistake.line == 0, mistake.line, mistake.column));
        mistakes.dedup();
        Err(mistakes)
    }

    fn at(&self, place: Place, message: String) -> Mistake {
        match place {
            Place::Byte(offset) => {
                let (line, column) = position(self.text, offset);
                Mistake { source: self.name.into(), line, column, message }
            }
            Place::Named(name) => Mistake { source: name.into(), line: 0, column: 0, message },
        }
    }
}

/// Line and column, both from 1, of a byte offset; the column counts characters, as editors do.
fn position(text: &str, offset: usize) -> (usize, usize) {
    let before = text.get(..offset).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |at| at + 1);
    let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
    (line, before.get(start..).unwrap_or_default().chars().count() + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_lines_and_characters_from_one() {
        let text = "a = 1\nü = 2\n";
        assert_eq!(position(text, 0), (1, 1));
        assert_eq!(position(text, 6), (2, 1));
        assert_eq!(position(text, 8), (2, 2));
        assert_eq!(position(text, 999), (3, 1));
        assert_eq!(position("", 0), (1, 1));
    }

    #[test]
    fn mistakes_come_in_the_order_of_the_file_and_flags_last() {
        let report = Report::new("x.toml", "one\ntwo\n");
        report.mistake(Place::Named("--listen"), "third");
        report.mistake(Place::Byte(4), "second");
        report.mistake(Place::Byte(1), "first");
        let lines: Vec<_> = report.finish().unwrap_err().iter().map(ToString::to_string).collect();
        assert_eq!(lines, ["x.toml:1:2: first", "x.toml:2:1: second", "--listen: third"]);
    }
}
