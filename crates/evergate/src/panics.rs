//! What is kept of a panic: it is counted, its place goes to the board, where it outlives the process, and a line to
//! standard error. Catching it is the boundaries' part (`tasks.rs`, `http/service.rs`, `http/body.rs`, `gate/pass.rs`).

use std::cell::RefCell;
use std::fmt::Write;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU64, Ordering};

use evergate_board::{Board, ChildRow, TEXT_BYTES_MAX, monotonic_ns};
use evergate_core::ids::RequestId;

use crate::telemetry::{names, talk};

/// Calls that are noted, innermost first: as many as the board's text holds, of at most eight digits.
const CALLS_MAX: usize = 28;
/// Lines a second: a request that panics may come a thousand times a second, and the first few say it all.
const LINES_MAX: u64 = 10;

thread_local! {
    /// Where this thread last panicked. On the stack's side of things: a panic may have come from the allocator.
    static LAST: RefCell<Text> = const { RefCell::new(Text::EMPTY) };
}

/// From now on every panic of this process, whose row and epoch these are, leaves a trace.
///
/// The library's own hook is not called: asked for names of functions it costs tens of MiB, and it prints the message,
/// which may hold what a client sent.
pub fn note(child: &'static str, board: &Board, (row, epoch): (u32, u32)) {
    let board = board.clone();
    std::panic::set_hook(Box::new(move |panic| {
        // A panic that must not unwind is followed by another, of the library itself, which says so: the first has the place.
        if panic.location().is_some_and(|place| place.file().ends_with("core/src/panicking.rs")) {
            return;
        }
        if let Some(series) = board.series(row) {
            series.add(names::key(names::PANICS, 0, 0, 0), 1);
        }
        let (place, offsets) = (place(panic), calls());
        let running = board.child(row).map_or(0, ChildRow::running);
        if let Some(row) = board.child(row) {
            row.set_panic(place.as_str(), offsets.as_str(), monotonic_ns());
        }
        if let Some(before) = TALK.admit(monotonic_ns() / 1_000_000_000) {
            let request = RequestId { run: board.run_id(), epoch, seq: u32::try_from(running).unwrap_or(0) };
            say(child, panic, (&place, &offsets), (running > 0).then_some(request), before);
        }
        // The thread may be ending, or within a look at its last panic: then nobody asks for this one.
        let _ = LAST.try_with(|last| last.try_borrow_mut().map(|mut last| *last = place));
    }));
}

/// Where this thread last panicked, for a record of what the panic ended: `panic at FILE:LINE:COLUMN`.
#[must_use]
pub fn last() -> String {
    LAST.try_with(|last| last.try_borrow().map(|last| format!("panic at {}", last.as_str())).unwrap_or_default())
        .unwrap_or_default()
}

fn place(panic: &PanicHookInfo<'_>) -> Text {
    let mut text = Text::EMPTY;
    if let Some(place) = panic.location() {
        // Cut off where it does not fit.
        let _ = write!(text, "{place}");
    }
    text
}

fn calls() -> Text {
    let mut offsets = [0; CALLS_MAX];
    let count = evergate_sys::call_offsets(&mut offsets);
    let mut text = Text::EMPTY;
    for offset in offsets.iter().take(count) {
        let _ = write!(text, "{}{offset:x}", if text.length == 0 { "" } else { " " });
    }
    text
}

/// A message in the program's text is shown; one that was put together at run time may hold a prompt or a key.
fn say(
    child: &str,
    panic: &PanicHookInfo<'_>,
    (place, offsets): (&Text, &Text),
    request: Option<RequestId>,
    unsaid: u64,
) {
    let mut line = Line::EMPTY;
    let _ = write!(line, "evergate {child}: panic at {}", place.as_str());
    if let Some(message) = panic.payload().downcast_ref::<&'static str>() {
        let _ = write!(line, " ({message})");
    }
    if let Some(request) = request {
        let _ = write!(line, ", request {}", request.text().as_str());
    }
    if unsaid > 0 {
        let _ = write!(line, "; {unsaid} more before it");
    }
    let _ = write!(line, "; calls {}", offsets.as_str());
    talk::print(line.as_str());
}

/// Bounds the lines a second.
struct Talk {
    second: AtomicU64,
    said: AtomicU64,
    unsaid: AtomicU64,
}

static TALK: Talk = Talk::new();

impl Talk {
    const fn new() -> Self {
        Self { second: AtomicU64::new(0), said: AtomicU64::new(0), unsaid: AtomicU64::new(0) }
    }

    /// Whether a line may be said in this second, and how many were not since the last one.
    fn admit(&self, second: u64) -> Option<u64> {
        if self.second.swap(second, Ordering::Relaxed) != second {
            self.said.store(0, Ordering::Relaxed);
        }
        if self.said.fetch_add(1, Ordering::Relaxed) < LINES_MAX {
            return Some(self.unsaid.swap(0, Ordering::Relaxed));
        }
        self.unsaid.fetch_add(1, Ordering::Relaxed);
        None
    }
}

/// A text without an allocation; what does not fit is cut off.
#[derive(Clone, Copy)]
struct Fixed<const BYTES: usize> {
    bytes: [u8; BYTES],
    length: usize,
}

type Text = Fixed<TEXT_BYTES_MAX>;
type Line = Fixed<{ 4 * TEXT_BYTES_MAX }>;

impl<const BYTES: usize> Fixed<BYTES> {
    const EMPTY: Self = Self { bytes: [0; BYTES], length: 0 };

    fn as_str(&self) -> &str {
        let bytes = self.bytes.get(..self.length).unwrap_or_default();
        std::str::from_utf8(bytes)
            .or_else(|error| std::str::from_utf8(bytes.get(..error.valid_up_to()).unwrap_or_default()))
            .unwrap_or_default()
    }
}

impl<const BYTES: usize> Write for Fixed<BYTES> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for (to, from) in self.bytes.iter_mut().skip(self.length).zip(text.bytes()) {
            *to = from;
            self.length += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_bounded_and_the_rest_is_counted() {
        let talk = Talk::new();
        let said: Vec<_> = (0..LINES_MAX + 5).filter_map(|_| talk.admit(7)).collect();
        assert_eq!(said, vec![0; usize::try_from(LINES_MAX).unwrap()]);
        assert_eq!((talk.admit(8), talk.admit(8)), (Some(5), Some(0)));
    }

    #[test]
    fn a_text_that_does_not_fit_is_cut_at_a_letter() {
        let mut text = Fixed::<5>::EMPTY;
        let _ = write!(text, "abcdé");
        assert_eq!(text.as_str(), "abcd");
    }
}
