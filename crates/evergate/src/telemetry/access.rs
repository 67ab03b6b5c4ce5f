//! Hands access records to the clerk: one line each, into a ring on the board that outlives this process.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use evergate_board::RecordWriter;
use evergate_core::record::Access;
use evergate_core::redact::Redactor;

/// The writing end of this process's ring.
#[derive(Debug)]
pub struct AccessLog {
    /// With the memory in which a line is made.
    ring: Mutex<(RecordWriter, String)>,
    /// Open as long as something may be written: see `lives::Inherited::writers`.
    _writers: OwnedFd,
    redactor: Arc<Redactor>,
}

impl AccessLog {
    /// Writes to `ring`, which has no other writer; takes secrets out of what is not our own text.
    #[must_use]
    pub fn new(ring: RecordWriter, writers: OwnedFd, redactor: Arc<Redactor>) -> Self {
        Self { ring: Mutex::new((ring, String::new())), _writers: writers, redactor }
    }

    /// Writes the record; `false` if the ring is full and the record is lost. `note` as in [`RecordWriter::write_noted`].
    pub fn write(&self, record: &Access<'_>, note: impl FnOnce(u64)) -> bool {
        // A panic in the middle has shown nothing, and a line begins anew.
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        let (ring, line) = &mut *ring;
        line.clear();
        if record.detail.is_empty() {
            record.write_line(line);
        } else {
            // The client's words have been looked at when they came: they are on the board, too.
            let detail = self.redactor.redact(record.detail);
            Access { detail: &detail, ..record.clone() }.write_line(line);
        }
        ring.write_noted(line.as_bytes(), note)
    }
}
