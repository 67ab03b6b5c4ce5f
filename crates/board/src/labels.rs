//! Label texts by number: append-only, so that a counter's labels mean the same for every reader for the whole run.

use std::sync::atomic::Ordering;

use crate::atomic::{AtomicU64, planted};

/// Bytes kept of a label's text.
pub const LABEL_BYTES_MAX: usize = 63;
/// The label that stands for those that found no place.
pub const OTHER: u16 = 1;

const WORDS: usize = 8;
/// The place is claimed by a text of this hash and length, whose words may not all be there yet.
const CLAIMED: u64 = 1;
/// The text is there.
const READY: u64 = 2;

/// One label. `head` is hash (upper 48 bits), length (8 bits), state (8 bits); 0 is free.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct LabelRow {
    head: AtomicU64,
    text: [AtomicU64; WORDS],
}

/// Finds or adds a text; lock-free, and a process that dies in the middle leaves nothing that stops another: whoever
/// comes to the same place with the same text completes it.
pub(crate) fn intern(rows: &[LabelRow], text: &str) -> u16 {
    let text = cut(text);
    if text.is_empty() {
        return 0;
    }
    let words = pack(text);
    let claim = claim_of(text.len(), &words);
    let Some(places) = rows.get(2..) else { return OTHER };
    let start = usize::try_from(claim >> 16).unwrap_or(0).checked_rem(places.len()).unwrap_or(0);
    if places.get(start).is_some_and(|place| settle(place, claim, &words)) {
        return u16::try_from(start + 2).unwrap_or(OTHER);
    }
    for index in (start + 1..places.len()).chain(0..start) {
        let Some(place) = places.get(index) else { break };
        if settle(place, claim, &words) {
            return u16::try_from(index + 2).unwrap_or(OTHER);
        }
    }
    OTHER
}

/// Puts the fixed labels in.
pub(crate) fn prepare(rows: &[LabelRow]) {
    if let Some(other) = rows.get(usize::from(OTHER)) {
        settle(other, claim_of("other".len(), &pack("other")), &pack("other"));
    }
}

/// The text of a label; empty for a number that nobody was given.
pub(crate) fn text(rows: &[LabelRow], id: u16) -> String {
    let Some(row) = rows.get(usize::from(id)) else { return String::new() };
    let head = row.head.load(Ordering::Acquire);
    if head & 0xff != READY {
        return String::new();
    }
    let length = usize::try_from(head >> 8 & 0xff).unwrap_or(0).min(LABEL_BYTES_MAX);
    let bytes: Vec<u8> = row.text.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
    String::from_utf8_lossy(bytes.get(..length).unwrap_or_default()).into_owned()
}

/// Whether this place holds the text, after taking it for the text if it was free.
fn settle(row: &LabelRow, claim: u64, words: &[u64; WORDS]) -> bool {
    let mut head = row.head.load(Ordering::Acquire);
    if head == 0 {
        head = match row.head.compare_exchange(0, claim | CLAIMED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => claim | CLAIMED,
            Err(_) if planted!(ClaimsTwice) => claim | CLAIMED,
            Err(other) => other,
        };
        if planted!(ReadyFirst) {
            row.head.store(claim | READY, Ordering::Release);
        }
    } else if planted!(LeavesClaim) && head == claim | CLAIMED {
        return true;
    }
    if head & !0xff != claim {
        return false;
    }
    if head & 0xff == CLAIMED {
        // Ours, or of somebody with the same text (hash and length agree) who may have died here: the same words
        // written twice do no harm.
        for (to, word) in row.text.iter().zip(words) {
            to.store(*word, Ordering::Relaxed);
        }
        row.head.store(claim | READY, Ordering::Release);
        return true;
    }
    row.text.iter().zip(words).all(|(there, word)| there.load(Ordering::Relaxed) == *word)
}

fn pack(text: &str) -> [u64; WORDS] {
    let mut bytes = [0; WORDS * 8];
    if let Some(bytes) = bytes.get_mut(..text.len()) {
        bytes.copy_from_slice(text.as_bytes());
    }
    let (groups, _) = bytes.as_chunks::<8>();
    let mut words = [0; WORDS];
    words.iter_mut().zip(groups).for_each(|(word, group)| *word = u64::from_le_bytes(*group));
    words
}

/// Hash and length in their places of the head word.
fn claim_of(length: usize, words: &[u64; WORDS]) -> u64 {
    // By words and not by bytes: every request asks for five labels. A multiplication carries upwards only, so the upper
    // half is folded into the lower after each.
    let hash = words.iter().take(length.div_ceil(8)).fold(0xcbf2_9ce4_8422_2325_u64, |hash, word| {
        let hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^ hash >> 32
    });
    let folded = (hash ^ hash >> 48) & 0xffff_ffff_ffff;
    folded << 16 | u64::try_from(length).unwrap_or(0) << 8
}

fn cut(text: &str) -> &str {
    if text.len() <= LABEL_BYTES_MAX {
        return text;
    }
    let end = (0..=text.len().min(LABEL_BYTES_MAX)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    text.get(..end).unwrap_or("")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(count: usize) -> Vec<LabelRow> {
        let rows: Vec<_> = (0..count)
            .map(|_| LabelRow { head: AtomicU64::new(0), text: std::array::from_fn(|_| AtomicU64::new(0)) })
            .collect();
        prepare(&rows);
        rows
    }

    #[test]
    fn texts_are_found_again_cut_and_overflow_to_other() {
        let rows = rows(4);
        assert_eq!(intern(&rows, ""), 0);
        let one = intern(&rows, "gpt-4o");
        assert_eq!(intern(&rows, "gpt-4o"), one);
        assert_eq!(text(&rows, one), "gpt-4o");
        let long = intern(&rows, &"é".repeat(50));
        assert_eq!(text(&rows, long), "é".repeat(31));
        assert_eq!(intern(&rows, "third"), OTHER);
        assert_eq!(text(&rows, OTHER), "other");
        assert_eq!(text(&rows, 0), "");
        assert_eq!(text(&rows, 999), "");
    }

    #[test]
    fn a_place_whose_claimant_died_is_completed() {
        let rows = rows(16);
        let claim = claim_of("model".len(), &pack("model"));
        let index = usize::try_from(claim >> 16).unwrap() % 14 + 2;
        rows[index].head.store(claim | CLAIMED, Ordering::Release);
        let id = intern(&rows, "model");
        assert_eq!(usize::from(id), index);
        assert_eq!(text(&rows, id), "model");
    }

    #[test]
    fn four_threads_agree_on_every_number() {
        let rows = rows(256);
        let names: Vec<String> = (0..200).map(|n| format!("model-{n}")).collect();
        let answers: Vec<Vec<u16>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|start| {
                    let (rows, names) = (&rows, &names);
                    scope.spawn(move || {
                        let mut ids = vec![0; names.len()];
                        for step in 0..names.len() {
                            let at = (step + start * 50) % names.len();
                            ids[at] = intern(rows, &names[at]);
                        }
                        ids
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(answers.iter().all(|ids| *ids == answers[0]));
        for (name, id) in names.iter().zip(&answers[0]) {
            assert_eq!(text(&rows, *id), *name);
        }
    }
}
