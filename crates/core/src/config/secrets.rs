//! Secrets and other files that a configuration refers to: read once, through the closures of `Facts`.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::keys::SECRET;
use super::load::Facts;
use super::mistake::{Place, Report};
use super::read::Value;
use super::{SecretRef, read::shown};

/// What has been read so far.
pub(super) struct Vault<'a> {
    report: &'a Report<'a>,
    facts: &'a Facts<'a>,
    dir: &'a str,
    secrets: RefCell<BTreeMap<String, String>>,
    files: RefCell<BTreeMap<String, String>>,
}

impl<'a> Vault<'a> {
    pub(super) fn new(report: &'a Report<'a>, facts: &'a Facts<'a>, dir: &'a str) -> Self {
        Self { report, facts, dir, secrets: RefCell::default(), files: RefCell::default() }
    }

    /// The configuration file's folder.
    pub(super) fn dir(&self) -> &'a str {
        self.dir
    }

    /// The secrets by reference and the files by path.
    pub(super) fn into_parts(self) -> (BTreeMap<String, String>, BTreeMap<String, String>) {
        (self.secrets.into_inner(), self.files.into_inner())
    }

    /// Reads `{ env = "NAME" }` or `{ file = "PATH" }` and what it refers to.
    pub(super) fn reference(&self, value: &Value<'a>) -> Option<SecretRef> {
        let wanted = "a reference, { env = \"NAME\" } or { file = \"PATH\" }";
        if value.as_text().is_some() {
            // The most likely string here is a real key: it is never repeated.
            let text = format!("\"{}\" must be {wanted}, never the secret itself", value.key);
            self.report.mistake(value.place, text);
            return None;
        }
        let section = value.section(self.report, &SECRET, wanted)?;
        let reference = match (section.get("env"), section.get("file")) {
            (Some(env), None) => SecretRef::Env(self.variable(&env)?),
            (None, Some(file)) => SecretRef::File(self.path(file.text(self.report)?, file.place)?),
            (Some(_), Some(file)) => {
                self.report.mistake(file.place, format!("\"{}\" has both env and file; keep one", value.key));
                return None;
            }
            (None, None) => {
                self.report.mistake(value.place, format!("\"{}\" must be {wanted}", value.key));
                return None;
            }
        };
        self.fetch(&reference, value.place);
        Some(reference)
    }

    /// The value of a reference that has been read.
    pub(super) fn value(&self, reference: &SecretRef) -> Option<String> {
        self.secrets.borrow().get(&reference.to_string()).cloned()
    }

    /// Reads what a reference refers to, reporting at `place` why it is of no use.
    pub(super) fn fetch(&self, reference: &SecretRef, place: Place) {
        if let Err(why) = self.try_fetch(reference) {
            self.report.mistake(place, why);
        }
    }

    /// Reads what a reference refers to and keeps it if it can be sent in a header.
    pub(super) fn try_fetch(&self, reference: &SecretRef) -> Result<(), String> {
        let value = match reference {
            SecretRef::Env(name) => (self.facts.env)(name).ok_or_else(|| {
                format!("the environment variable {name} is not set; set it or remove this reference")
            })?,
            SecretRef::File(path) => {
                let why = |why| format!("the secret file \"{}\" cannot be read: {why}", shown(path));
                without_line_end(&(self.facts.read_file)(path).map_err(why)?).to_owned()
            }
        };
        check_for_header(&value).map_err(|why| format!("the secret in {reference} {why}"))?;
        self.secrets.borrow_mut().insert(reference.to_string(), value);
        Ok(())
    }

    /// Reads a file that is no secret's (certificates, and the private key that goes with them).
    pub(super) fn file(&self, path: &str, place: Place) -> Option<String> {
        let path = self.path(path, place)?;
        match (self.facts.read_file)(&path) {
            Ok(text) if !text.contains("-----BEGIN ") => {
                self.report
                    .mistake(place, format!("\"{}\" is not a PEM file: it has no -----BEGIN line", shown(&path)));
            }
            Ok(text) => {
                self.files.borrow_mut().insert(path.clone(), text);
            }
            Err(why) => self.report.mistake(place, format!("\"{}\" cannot be read: {why}", shown(&path))),
        }
        Some(path)
    }

    /// A path as seen from the configuration file's folder.
    fn path(&self, path: &str, place: Place) -> Option<String> {
        if path.is_empty() {
            self.report.mistake(place, "a file's path must not be empty");
            return None;
        }
        let is_whole = path.starts_with('/') || self.dir.is_empty() || self.dir == ".";
        Some(if is_whole { path.into() } else { format!("{}/{path}", self.dir.trim_end_matches('/')) })
    }

    fn variable(&self, value: &Value<'a>) -> Option<String> {
        let name = value.text(self.report)?;
        if !is_variable(name) {
            // Not repeated: somebody may have written the key itself here.
            let text = "\"env\" must be the name of an environment variable: letters, digits and _, such as \"MY_KEY\"";
            self.report.mistake(value.place, text);
            return None;
        }
        Some(name.into())
    }
}

/// Whether it can be the name of an environment variable: POSIX's portable names, in either case.
pub(super) fn is_variable(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.len() <= 128
}

fn without_line_end(text: &str) -> &str {
    let text = text.strip_suffix('\n').unwrap_or(text);
    text.strip_suffix('\r').unwrap_or(text)
}

/// Longest secret, bytes: a header line has to hold it.
const SECRET_BYTES_MAX: usize = 8192;

fn check_for_header(value: &str) -> Result<(), &'static str> {
    if value.is_empty() {
        Err("is empty")
    } else if value.bytes().any(|byte| byte.is_ascii_whitespace() || byte.is_ascii_control()) {
        Err("contains white space or a control character")
    } else if !value.is_ascii() {
        Err("contains a non-ASCII character, which no header can carry")
    } else if value.len() > SECRET_BYTES_MAX {
        Err("is longer than 8 KiB")
    } else {
        Ok(())
    }
}
