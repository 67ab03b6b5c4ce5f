//! What a clerk wrote last: one that dies when it has written lines, before it has let go of them in the rings, leaves them there
//! for the next.
//!
//! Holds INV-RECORD-1 (ARCHITECTURE.md).

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use evergate_core::record::LINE_BYTES_MAX;
use memchr::memmem;

/// What stands before the id in every line.
const BEFORE_ID: &[u8] = b"\"request_id\":\"";

/// A clerk's first batch without what its predecessor has written of it, to the old file or the new one. Later batches hold
/// what was never looked at before.
pub(super) fn without_repeats(batch: &[u8], [old, new]: [&Path; 2]) -> Vec<u8> {
    // What it wrote and did not let go of is in this batch, so it is no more than that.
    let most = batch.len().saturating_add(LINE_BYTES_MAX);
    let new = tail(new, most).unwrap_or_default();
    let rest = most.saturating_sub(new.len());
    let old = if rest > LINE_BYTES_MAX { tail(old, rest).unwrap_or_default() } else { Vec::new() };
    let known: HashSet<&[u8]> = [&old, &new].into_iter().flat_map(|file| lines(file)).filter_map(id).collect();
    let is_new = |line: &&[u8]| id(line).is_none_or(|id| !known.contains(id));
    lines(batch).filter(is_new).collect::<Vec<_>>().concat()
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

    fn line(request_id: &str) -> String {
        let mut out = String::new();
        Access { request_id, ..Access::default() }.write_line(&mut out);
        out
    }

    #[test]
    fn what_a_predecessor_wrote_is_not_written_again_but_for_half_a_line() {
        let folder = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| folder.path().join(name));
        let [one, two, three, other] = ["req_1", "req_2", "req_3", "req_11"].map(line);
        std::fs::write(&old, &one).unwrap();
        std::fs::write(&new, format!("{two}{}", &three[..three.len() - 3])).unwrap();
        let sifted = |batch: &[&str]| {
            let batch = batch.concat();
            String::from_utf8(without_repeats(batch.as_bytes(), [&old, &new])).unwrap()
        };
        assert_eq!(sifted(&[&one, &two, &three]), three);
        // An id that begins like another is another.
        assert_eq!(sifted(&[&other, &one, "{}\n"]), [&other, "{}\n"].concat());
        std::fs::remove_file(&new).unwrap();
        assert_eq!(sifted(&[&one, &two]), two);
    }
}
