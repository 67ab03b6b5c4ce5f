//! Second records of one request: a worker that dies just when it has written one cannot say so, and the master, in
//! doubt, writes another; and a clerk that dies when it has written lines, before it has let go of them in
//! the rings, leaves them there for the next.
//!
//! Holds INV-RECORD-1 (ARCHITECTURE.md).

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use evergate_board::RING_BYTES;
use evergate_core::record::LINE_BYTES_MAX;
use memchr::memmem;

/// How the master's lines end (`Access::is_by_master`).
const MARK: &[u8] = b",\"by_master\":true}";
/// What stands before the id in every line.
const BEFORE_ID: &[u8] = b"\"request_id\":\"";

/// Remembers the batch before: the two records follow each other within milliseconds, but a look at the rings may fall
/// between them.
#[derive(Debug, Default)]
pub(super) struct Repeats {
    before: Vec<u8>,
    /// Whether any line of the next batch may be a second one, not only the master's.
    is_first: bool,
}

impl Repeats {
    /// Knows what a predecessor wrote last. What it wrote and did not let go of is in the first batch, so it is no more than that;
    /// but the master's line in it may be the second of a request whose first the predecessor did let go of.
    pub(super) fn after([old, new]: [&Path; 2], batch_bytes: usize) -> Self {
        let most = batch_bytes.max(RING_BYTES).saturating_add(LINE_BYTES_MAX);
        let new = tail(new, most).unwrap_or_default();
        let rest = most.saturating_sub(new.len());
        let old = if rest > LINE_BYTES_MAX { tail(old, rest).unwrap_or_default() } else { Vec::new() };
        Self { before: [old, new].concat(), is_first: true }
    }

    /// The batch without second records of requests.
    pub(super) fn without(&mut self, batch: Vec<u8>) -> &[u8] {
        let is_first = std::mem::take(&mut self.is_first);
        let has_repeats = is_first || memmem::find(&batch, MARK).is_some();
        // What was before goes: with all rings full a batch is large.
        self.before = if has_repeats { self.sift(&batch, is_first) } else { batch };
        &self.before
    }

    fn sift(&self, batch: &[u8], is_any: bool) -> Vec<u8> {
        let mut known: HashSet<&[u8]> = lines(&self.before).filter_map(id).collect();
        let mut kept: Vec<u8> = Vec::with_capacity(batch.len());
        for line in lines(batch) {
            let may_repeat = is_any || line.trim_ascii_end().ends_with(MARK);
            let is_known = id(line).is_some_and(|id| !known.insert(id));
            if !(may_repeat && is_known) {
                kept.extend_from_slice(line);
            }
        }
        kept
    }
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split_inclusive(|byte| *byte == b'\n')
}

/// The last whole lines of a file, so many bytes at most. Nothing of what is no file: a look at it could wait for ever.
fn tail(path: &Path, most: usize) -> std::io::Result<Vec<u8>> {
    let most = u64::try_from(most).unwrap_or(u64::MAX);
    if !std::fs::metadata(path)?.is_file() {
        return Ok(Vec::new());
    }
    let mut file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(most);
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(most.saturating_mul(2)).read_to_end(&mut bytes)?;
    // A line that was cut off is written again.
    bytes.truncate(memchr::memrchr(b'\n', &bytes).map_or(0, |at| at + 1));
    Ok(bytes)
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

    fn pass(repeats: &mut Repeats, lines: &[String]) -> String {
        str::from_utf8(repeats.without(lines.concat().into_bytes())).unwrap().to_owned()
    }

    #[test]
    fn a_second_record_goes_and_a_first_stays() {
        let mut repeats = Repeats::default();
        let (own, only) = (line("req_1", false), line("req_2", true));
        // In one batch, and over two.
        assert_eq!(pass(&mut repeats, &[own.clone(), line("req_1", true), only.clone()]), [own, only].concat());
        assert_eq!(pass(&mut repeats, &[line("req_1", true)]), "");
        // Another id that begins like it is another.
        let other = line("req_11", false);
        assert_eq!(pass(&mut repeats, std::slice::from_ref(&other)), other);
        assert_eq!(pass(&mut repeats, &[line("req_1", true)]), line("req_1", true));
    }

    /// It was let go of with a batch that the master's line was not in, and much was written behind it.
    #[test]
    fn a_second_record_goes_though_the_first_is_far_back_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let [none, new] = ["none", "new"].map(|name| folder.path().join(name));
        let more: String = (2..1_000).map(|number| line(&format!("req_{number}"), false)).collect();
        assert!(more.len() > 100_000);
        std::fs::write(&new, line("req_1", false) + &more).unwrap();
        let (second, other) = (line("req_1", true), line("req_1000", true));
        assert_eq!(pass(&mut Repeats::after([&none, &new], second.len()), &[second, other.clone()]), other);
    }

    #[test]
    fn what_a_predecessor_wrote_is_not_written_again_but_for_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| folder.path().join(name));
        let [one, two, three] = ["req_1", "req_2", "req_3"].map(|id| line(id, false));
        std::fs::write(&old, &one).unwrap();
        std::fs::write(&new, format!("{two}{}", &three[..three.len() - 3])).unwrap();
        let mut repeats = Repeats::after([&old, &new], 0);
        assert_eq!(pass(&mut repeats, &[one, two, three.clone()]), three);
        // Only in the first batch: later ones hold what was never looked at before.
        let four = line("req_4", false);
        assert_eq!(pass(&mut repeats, &[four.clone(), four.clone()]), [four.clone(), four].concat());
    }
}
