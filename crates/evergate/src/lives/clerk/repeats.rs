//! Second records of one request: a worker that dies just when it has written one cannot say so, and the master, in
//! doubt, writes another.
//!
//! Holds INV-RECORD-1 (ARCHITECTURE.md).

use memchr::memmem;

/// How the master's lines end (`Access::is_by_master`).
const MARK: &[u8] = b",\"by_master\":true}";
/// What stands before the id in every line.
const BEFORE_ID: &[u8] = b"\"request_id\":\"";

/// Remembers the batch before: the two records follow each other within milliseconds, but a look at the pipe may fall
/// between them.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    before: Vec<u8>,
}

impl Repeats {
    /// The batch without the master's records of requests that have one already.
    pub(super) fn without(&mut self, batch: Vec<u8>) -> Vec<u8> {
        let batch = if memmem::find(&batch, MARK).is_some() { self.sift(&batch) } else { batch };
        self.before.clone_from(&batch);
        batch
    }

    fn sift(&self, batch: &[u8]) -> Vec<u8> {
        let mut kept: Vec<u8> = Vec::with_capacity(batch.len());
        for line in batch.split_inclusive(|byte| *byte == b'\n') {
            let is_by_master = line.trim_ascii_end().ends_with(MARK);
            let is_known = |id: &[u8]| memmem::find(&kept, id).is_some() || memmem::find(&self.before, id).is_some();
            if !(is_by_master && id(line).is_some_and(is_known)) {
                kept.extend_from_slice(line);
            }
        }
        kept
    }
}

/// The id with its key and quotes: no client's text can hold that, since quotes within texts are escaped.
fn id(line: &[u8]) -> Option<&[u8]> {
    let start = memmem::find(line, BEFORE_ID)?;
    let after = start.checked_add(BEFORE_ID.len())?;
    let length = memchr::memchr(b'"', line.get(after..)?)?;
    line.get(start..after.checked_add(length)?.checked_add(1)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use evergate_core::record::Access;

    fn line(request_id: &str, is_by_master: bool) -> String {
        let mut out = String::new();
        Access { request_id, is_by_master, ..Access::default() }.write_line(&mut out);
        out
    }

    #[test]
    fn a_second_record_goes_and_a_first_stays() {
        let mut repeats = Repeats::default();
        let pass = |repeats: &mut Repeats, lines: &[String]| {
            String::from_utf8(repeats.without(lines.concat().into_bytes())).unwrap()
        };
        let (own, only) = (line("req_1", false), line("req_2", true));
        // In one batch, and over two.
        assert_eq!(pass(&mut repeats, &[own.clone(), line("req_1", true), only.clone()]), [own, only].concat());
        assert_eq!(pass(&mut repeats, &[line("req_1", true)]), "");
        // Another id that begins like it is another.
        let other = line("req_11", false);
        assert_eq!(pass(&mut repeats, std::slice::from_ref(&other)), other);
        assert_eq!(pass(&mut repeats, &[line("req_1", true)]), line("req_1", true));
    }
}
