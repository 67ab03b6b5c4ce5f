//! Why a program does not serve.

use evergate_core::{Error, Fault};

/// Of a program's last words, what goes with a cause.
const WORDS_BYTES: usize = 1 << 10;

/// Why there is no program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Its row in the table.
    pub fault: Fault,
    /// For clients.
    pub message: String,
    /// For records: the program's last words, which may hold anything.
    pub detail: String,
}

impl Cause {
    /// What an error says, and the last of what the program wrote to standard error; an error's own detail stands where it
    /// wrote nothing.
    pub(crate) fn new(error: &Error, tail: &[u8]) -> Self {
        let words = tail.get(tail.len().saturating_sub(WORDS_BYTES)..).unwrap_or_default();
        let detail = match words.trim_ascii() {
            [] => error.detail.clone().unwrap_or_default(),
            words => String::from_utf8_lossy(words).into_owned(),
        };
        Self { fault: error.fault, message: error.message.clone().into_owned(), detail }
    }

    pub(crate) fn error(&self) -> Error {
        let error = Error::new(self.fault, self.message.clone());
        if self.detail.is_empty() { error } else { error.detail(&self.detail) }
    }
}
