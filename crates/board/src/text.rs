//! A short text in shared memory, whole or as far as its writer came.

use std::sync::atomic::{Ordering, fence};

use crate::atomic::{AtomicU64, planted};

/// Bytes kept of a text.
pub const TEXT_BYTES_MAX: usize = 256;

/// A text with one writer at a time and any number of readers.
#[derive(Debug)]
#[cfg_attr(test, derive(Default))]
#[repr(C)]
pub(crate) struct Text {
    version: AtomicU64,
    length: AtomicU64,
    words: [AtomicU64; TEXT_BYTES_MAX / 8],
}

impl Text {
    pub(crate) fn get(&self) -> String {
        let mut text = (false, Vec::new());
        // A writer that died in the middle leaves the version odd: then what is there is better than nothing.
        for _ in 0..16 {
            text = self.read();
            if text.0 {
                break;
            }
        }
        String::from_utf8_lossy(&text.1).into_owned()
    }

    /// What is there, and whether that is a whole text.
    pub(crate) fn read(&self) -> (bool, Vec<u8>) {
        let before = self.version.load(Ordering::Acquire);
        let length = usize::try_from(self.length.load(Ordering::Relaxed)).unwrap_or(0).min(TEXT_BYTES_MAX);
        let mut bytes: Vec<u8> =
            self.words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_le_bytes()).collect();
        bytes.truncate(length);
        fence(Ordering::Acquire);
        let is_same = self.version.load(Ordering::Relaxed) == before || planted!(ReadsOnce);
        (before.is_multiple_of(2) && is_same, bytes)
    }

    /// What is beyond 256 bytes is cut off.
    pub(crate) fn set(&self, text: &str) {
        let end = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        let text = text.get(..end).unwrap_or("").as_bytes();
        let version = self.version.load(Ordering::Relaxed) | 1;
        if !planted!(WritesUnseen) {
            self.version.store(version, Ordering::Relaxed);
        }
        fence(Ordering::Release);
        self.length.store(u64::try_from(text.len()).unwrap_or(0), Ordering::Relaxed);
        for (word, chunk) in self.words.iter().zip(text.chunks(8)) {
            let mut bytes = [0; 8];
            bytes.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            word.store(u64::from_le_bytes(bytes), Ordering::Relaxed);
        }
        self.version.store(version.wrapping_add(1), Ordering::Release);
    }
}
