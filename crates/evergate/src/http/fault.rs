//! Planted faults for drills: only in debug builds, and only where `EVERGATE_FAULT=1` stands in the environment.

use rustix::time::{ClockId, clock_gettime};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use http::HeaderMap;

/// A fault that a request asks for by `x-evergate-fault`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Planted {
    /// `panic-head`: panic before admission.
    PanicHead,
    /// `panic-handler`: panic in the handler, after admission.
    PanicHandler,
    /// `panic-stream`: panic in the body, after the first piece.
    PanicStream,
    /// `panic-drop`: panic while the handler's values are dropped, at its end.
    PanicDrop,
    /// `panic-drop-stream`: the same with the body of a stream.
    PanicDropStream,
    /// `panic-PLACE`: panic the next time that something passes this place: `pass` (the books of a request), `connection`
    /// (before its next write), or the turn of a kept task (`beat`, `clock`, `sweep`, `accept`).
    PanicAt(Place),
    /// `double-panic`: panic while a panic unwinds, which ends the process.
    DoublePanic,
    /// `abort`: end the process by ABRT.
    Abort,
    /// `abort-noted`, `abort-added`, `abort-counted`, `abort-recording`, `abort-written`: the same at that place in the books of the
    /// next request but this one.
    AbortIn(Books),
    /// `stop-written`: stop there as by SIGSTOP.
    StopIn(Books),
    /// `exit-N`: end the process with this code.
    Exit(u8),
    /// `eat`: take memory until somebody ends the process, at most [`EAT_BYTES_MAX`].
    Eat,
    /// `lose-N`: open so many descriptors and forget them.
    Lose(u16),
    /// `stuck-stream`: never go on after the first piece, cancelled or not.
    StuckStream,
    /// `spin`: hold the event loop for ever.
    Spin,
    /// `work-N`: hold it for so many milliseconds of the processor's time.
    Work(u16),
    /// `spin-stream`: the same in the body, after the first piece.
    SpinStream,
}

/// Where an armed panic waits for whoever comes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those in `PanicAt`")]
pub enum Place {
    Pass,
    Connection,
    Beat,
    Clock,
    Sweep,
    Accept,
}

/// Panics that wait, by place.
static ARMED: [AtomicU32; 6] = [const { AtomicU32::new(0) }; 6];

impl Place {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "pass" => Self::Pass,
            "connection" => Self::Connection,
            "beat" => Self::Beat,
            "clock" => Self::Clock,
            "sweep" => Self::Sweep,
            "accept" => Self::Accept,
            _ => return None,
        })
    }
}

/// Passes a place where a panic may have been armed.
#[allow(clippy::panic, reason = "this is what the drill is for")]
pub fn pass_by(place: Place) {
    let take = |armed: u32| armed.checked_sub(1);
    if cfg!(debug_assertions)
        && ARMED
            .get(place as usize)
            .is_some_and(|armed| armed.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok())
    {
        panic!("a planted fault in passing");
    }
}

/// A place in the books of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Books {
    /// It is noted that it is being counted.
    Noted,
    /// The counter has it.
    Added,
    /// That is said on its row.
    Counted,
    /// It is noted that its record is about to be shown.
    Recording,
    /// Its record is written.
    Written,
}

/// How many pass a place in their books until the process ends there; 0 for never.
static BOOKS: [AtomicU32; 5] = [const { AtomicU32::new(0) }; 5];
/// Whether it stops there instead.
static STOPS: AtomicBool = AtomicBool::new(false);

/// Passes a place where the process may be meant to end.
pub fn die_in_books(place: Books) {
    let take = |left: u32| left.checked_sub(1);
    if cfg!(debug_assertions)
        && BOOKS
            .get(place as usize)
            .is_some_and(|left| left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) == Ok(1))
    {
        if STOPS.load(Ordering::Relaxed) {
            // A drill that sees no stop says so.
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
        } else {
            std::process::abort();
        }
    }
}

/// Panics when it is dropped, if that is what the request asked for.
#[derive(Debug)]
pub struct Bomb {
    is_armed: bool,
}

impl Bomb {
    /// Armed if `planted` is `fault`.
    #[must_use]
    pub fn new(planted: Option<Planted>, fault: Planted) -> Self {
        Self { is_armed: cfg!(debug_assertions) && planted == Some(fault) }
    }
}

impl Drop for Bomb {
    #[allow(clippy::panic, reason = "this is what the drill is for")]
    fn drop(&mut self) {
        if cfg!(debug_assertions) && self.is_armed {
            panic!("a planted fault in a drop");
        }
    }
}

/// Where a fault can strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Before the body is read.
    Head,
    /// In the handler, after admission.
    Handler,
    /// In the body, after the first piece.
    Stream,
}

/// Where `eat` stops, so that a drill without a memory limit does not take the machine down.
const EAT_BYTES_MAX: usize = 1 << 30;

/// The fault that this request plants.
#[must_use]
pub fn planted(headers: &HeaderMap) -> Option<Planted> {
    if !cfg!(debug_assertions) || std::env::var_os("EVERGATE_FAULT").is_none_or(|value| value != "1") {
        return None;
    }
    Some(match headers.get("x-evergate-fault")?.to_str().ok()? {
        "panic-head" => Planted::PanicHead,
        "panic-handler" => Planted::PanicHandler,
        "panic-stream" => Planted::PanicStream,
        "panic-drop" => Planted::PanicDrop,
        "panic-drop-stream" => Planted::PanicDropStream,
        "double-panic" => Planted::DoublePanic,
        "abort" => Planted::Abort,
        "abort-noted" => Planted::AbortIn(Books::Noted),
        "abort-added" => Planted::AbortIn(Books::Added),
        "abort-counted" => Planted::AbortIn(Books::Counted),
        "abort-recording" => Planted::AbortIn(Books::Recording),
        "abort-written" => Planted::AbortIn(Books::Written),
        "stop-written" => Planted::StopIn(Books::Written),
        "eat" => Planted::Eat,
        "stuck-stream" => Planted::StuckStream,
        "spin" => Planted::Spin,
        "spin-stream" => Planted::SpinStream,
        other if let Some(count) = other.strip_prefix("lose-") => Planted::Lose(count.parse().ok()?),
        other if let Some(ms) = other.strip_prefix("work-") => Planted::Work(ms.parse().ok()?),
        other => match other.strip_prefix("panic-") {
            Some(place) => Planted::PanicAt(Place::of(place)?),
            None => Planted::Exit(other.strip_prefix("exit-")?.parse().ok()?),
        },
    })
}

/// Carries out the fault, if its moment is `here`.
#[allow(clippy::panic, clippy::exit, reason = "this is what the drill is for")]
pub fn strike(planted: Option<Planted>, here: Moment) {
    match (planted, here) {
        (Some(Planted::PanicHead), Moment::Head)
        | (Some(Planted::PanicHandler), Moment::Handler)
        | (Some(Planted::PanicStream), Moment::Stream) => {
            panic!("a planted fault");
        }
        (Some(Planted::DoublePanic), Moment::Handler) => {
            let _second = PanicsInDrop;
            panic!("a planted fault: the first panic");
        }
        (Some(Planted::PanicAt(place)), Moment::Handler) => {
            if let Some(armed) = ARMED.get(place as usize) {
                armed.fetch_add(1, Ordering::Relaxed);
            }
        }
        (Some(Planted::Abort), Moment::Handler) => std::process::abort(),
        (Some(fault @ (Planted::AbortIn(place) | Planted::StopIn(place))), Moment::Handler) => {
            STOPS.store(fault == Planted::StopIn(place), Ordering::Relaxed);
            if let Some(left) = BOOKS.get(place as usize) {
                // This request's own books come first.
                left.store(2, Ordering::Relaxed);
            }
        }
        (Some(Planted::Exit(code)), Moment::Handler) => std::process::exit(code.into()),
        (Some(Planted::Eat), Moment::Handler) => eat(),
        (Some(Planted::Lose(count)), Moment::Handler) => lose(count),
        (Some(Planted::Work(ms)), Moment::Handler) => work(i64::from(ms)),
        (Some(Planted::Spin), Moment::Handler) | (Some(Planted::SpinStream), Moment::Stream) => spin(),
        _ => {}
    }
}

/// Whether a body that has this fault has gone as far as it will.
#[must_use]
pub fn is_stuck(planted: Option<Planted>) -> bool {
    cfg!(debug_assertions) && planted == Some(Planted::StuckStream)
}

fn work(ms: i64) {
    let spent = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec * 1_000 + time.tv_nsec / 1_000_000
    };
    let end = spent() + ms;
    while spent() < end {
        std::hint::spin_loop();
    }
}

struct PanicsInDrop;

impl Drop for PanicsInDrop {
    #[allow(clippy::panic, reason = "this is what the drill is for")]
    fn drop(&mut self) {
        panic!("a planted fault: the second panic");
    }
}

fn eat() {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    while eaten.len() < EAT_BYTES_MAX >> 20 {
        // Not zeros, which would take no memory.
        eaten.push(vec![1; 1 << 20]);
    }
    spin();
}

/// What cannot be opened any more is not lost.
fn lose(count: u16) {
    (0..count).filter_map(|_| std::fs::File::open("/dev/null").ok()).for_each(std::mem::forget);
}

fn spin() -> ! {
    loop {
        std::hint::spin_loop();
    }
}
