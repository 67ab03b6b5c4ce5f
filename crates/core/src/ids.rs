//! Request ids: our own, unique over processes and restarts, and what we accept of a client's.

use std::fmt;

use crate::digits::write_hex;

/// Most bytes of a client's `x-request-id` that are echoed and recorded.
pub const CLIENT_ID_BYTES_MAX: usize = 64;

/// One request of this gateway: the run of the master, the child that took it, and a count within the child.
///
/// `epoch` counts children started in a run and never repeats, so that a replacement in the same slot makes other ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RequestId {
    /// Random, chosen by the master at its start.
    pub run: u64,
    /// The child's number within the run, from 1.
    pub epoch: u32,
    /// The request's number within the child, from 1.
    pub seq: u32,
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text().as_str())
    }
}

/// A request id as text: `req_` and 30 hexadecimal digits.
#[derive(Clone, Copy, Debug)]
pub struct RequestIdText([u8; 34]);

impl RequestIdText {
    /// The text's bytes, all of them ASCII.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl RequestId {
    /// The id as text, without an allocation. Of the epoch the lowest 24 bits count.
    #[must_use]
    pub fn text(&self) -> RequestIdText {
        let mut text = *b"req_                              ";
        for (range, value) in [(4..20, self.run), (20..26, self.epoch.into()), (26..34, self.seq.into())] {
            write_hex(text.get_mut(range).unwrap_or_default(), value);
        }
        RequestIdText(text)
    }
}

/// Whether a client's request id may be echoed and written to records: 1 to 64 of `A-Z a-z 0-9 . _ : -`.
#[must_use]
pub fn is_well_formed(id: &[u8]) -> bool {
    !id.is_empty()
        && id.len() <= CLIENT_ID_BYTES_MAX
        && id.iter().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b':' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_by_each_part() {
        let id = RequestId { run: 7, epoch: 1, seq: 1 };
        assert_eq!(id.to_string(), "req_000000000000000700000100000001");
        assert_ne!(id.to_string(), RequestId { epoch: 2, ..id }.to_string());
    }

    #[test]
    fn only_plain_ids_are_accepted() {
        assert!(is_well_formed(b"abc-DEF_1.2:3"));
        for bad in [&b""[..], b"a b", b"a\r\nb", b"\xc3\xa9", &[b'a'; 65]] {
            assert!(!is_well_formed(bad));
        }
    }
}
