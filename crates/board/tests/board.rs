//! The board as two processes see it: two mappings of one descriptor.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use evergate_board::{
    Board, Claim, Error, HOSTS_MAX, HostState, InflightPhase, InflightPlace, InflightStart, MasterPhase, Phase,
    SeriesKey, Shape, monotonic_ns,
};
use evergate_core::exit::Kind;

const SHAPE: Shape = Shape { children: 4, slots: 8, series: 64, labels: 128 };

fn pair() -> (Board, Board) {
    let board = Board::create(SHAPE, 0xfeed).unwrap();
    let other = Board::attach(board.fd().try_clone_to_owned().unwrap()).unwrap();
    (board, other)
}

fn claim(epoch: u32) -> Claim {
    Claim { kind: Kind::Worker, slot: 1, epoch, generation: 7, spawned_ns: monotonic_ns() }
}

fn start(seq: u32, client_id: &str) -> InflightStart<'_> {
    InflightStart { seq, epoch: 5, client_id, route: 3, key: 4, method: 5, started_ns: 99 }
}

#[test]
fn both_mappings_show_the_same() {
    let (board, other) = pair();
    assert_eq!((other.run_id(), other.shape()), (0xfeed, SHAPE));
    board.master().set_phase(MasterPhase::Settling);
    assert_eq!(other.master().phase(), MasterPhase::Settling);

    let row = board.child(2).unwrap();
    row.claim(&claim(5));
    row.set_pid(42);
    let seen = other.child(2).unwrap();
    assert_eq!((seen.kind(), seen.epoch(), seen.phase(), seen.pid()), (Some(Kind::Worker), 5, Phase::Booting, 42));
    seen.set_note("no \"key\" é");
    seen.set_accepting(true);
    assert_eq!(row.note(), "no \"key\" é");
    assert!(row.accepting());
    row.set_note(&"é".repeat(200));
    assert_eq!(seen.note(), "é".repeat(128));
    assert!(board.child(4).is_none());
    assert_eq!(board.children().count(), 4);

    let label = board.label("gpt-4o");
    assert_eq!(other.label("gpt-4o"), label);
    assert_eq!(other.label_text(label), "gpt-4o");
}

#[test]
fn in_flight_rows_say_who_is_inside_until_the_ticket_drops() {
    let (board, other) = pair();
    board.child(1).unwrap().claim(&claim(5));
    let rows = other.inflight_rows(1);
    let first = rows.admit(start(1, "client-1")).unwrap();
    let second = rows.admit(start(2, "")).unwrap();
    first.set_phase(InflightPhase::Stream);
    first.set_model(9, &"m".repeat(70));
    first.set_model(10, "the first name stays");
    first.set_model(9, "");
    first.set_backend(6, 2);
    first.set_stream(true);
    let seen: Vec<_> = board.inflight(1).collect();
    assert_eq!(seen.len(), 2);
    assert_eq!(seen[0].client_id, "client-1");
    assert_eq!((seen[0].route, seen[0].key, seen[0].model, seen[0].started_ns), (3, 4, 9, 99));
    assert_eq!((seen[0].phase, seen[0].is_stream), (InflightPhase::Stream, true));
    assert_eq!((seen[0].method, seen[0].backend, seen[0].attempts), (5, 6, 2));
    assert_eq!(seen[0].model_name, "m".repeat(64));
    assert_eq!((seen[0].end, seen[0].is_counted, seen[0].is_over()), (None, false, false));
    first.set_end(76);
    let ended = board.inflight(1).next().unwrap();
    assert_eq!((ended.end, ended.counter_before, ended.is_over()), (Some(76), None, false));
    // A counter beyond 32 bits is compared by its lower half.
    let before = (7 << 32) | 0xffff_ffff;
    first.set_counting(77, before);
    let over = board.inflight(1).next().unwrap();
    assert_eq!((over.end, over.is_counted, over.is_over()), (Some(77), false, true));
    assert_eq!([before, before + 1].map(|now| over.was_counted(now)), [false, true]);
    first.set_counted();
    let over = board.inflight(1).next().unwrap();
    assert_eq!((over.end, over.is_counted, over.was_counted(before)), (Some(77), true, true));
    assert_eq!((seen[1].backend, seen[1].model_name.as_str(), seen[1].end), (0, "", None));
    assert_eq!(seen[1].request_id(board.run_id()).to_string(), "req_000000000000feed00000500000002");
    drop(first);
    assert_eq!(rows.occupied(), 1);
    assert_eq!(board.inflight(1).map(|one| one.seq).collect::<Vec<_>>(), [2]);

    let more: Vec<_> = (3..10).map_while(|seq| rows.admit(start(seq, "x"))).collect();
    assert_eq!(more.len(), 7, "eight rows, one was taken");
    assert!(rows.admit(start(99, "")).is_none());
    drop((second, more));
    assert_eq!((rows.occupied(), board.inflight(1).count()), (0, 0));
    // A row outside the board has no room, and nothing worse.
    assert!(other.inflight_rows(77).admit(start(1, "")).is_none());
}

/// Two threads with mappings of their own, on real memory, over the ring's end some thirty times.
#[test]
fn records_come_through_whole_and_in_order_beside_their_writer() {
    const LINES: usize = 100_000;
    let (board, other) = pair();
    let line = |number: usize| format!("{number} {}\n", "x".repeat(number * 7919 % 700));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut writer = other.record_writer(1);
            for number in 0..LINES {
                while !writer.write(line(number).as_bytes()) {
                    std::thread::yield_now();
                }
            }
        });
        let mut number = 0;
        while number < LINES {
            let found = board.records();
            assert_eq!(found.broken, 0);
            for text in str::from_utf8(&found.bytes).unwrap().split_inclusive('\n') {
                assert_eq!(text, line(number));
                number += 1;
            }
            board.take_records(&found);
        }
    });
    assert!(board.records().is_empty());
}

#[test]
fn a_host_marks_the_request_that_it_was_told_of_and_no_other() {
    let (board, other) = pair();
    board.child(1).unwrap().claim(&claim(5));
    let rows = board.inflight_rows(1);
    let first = rows.admit(start(1, "a")).unwrap();
    let place: InflightPlace = first.place().to_string().parse().unwrap();
    assert_eq!(place, first.place());
    assert!(!first.is_taken());
    other.mark_taken(place);
    assert!(first.is_taken());
    drop(first);
    // The row is the next one's: a mark that comes late is nobody's.
    let second = rows.admit(start(2, "b")).unwrap();
    other.mark_taken(place);
    assert!(!second.is_taken());
    other.mark_taken(second.place());
    other.mark_taken(place);
    assert!(second.is_taken());
    for text in ["", "1.2", "1.2.x", "1.2.3.4", "-1.0.0", "99999999999.0.0"] {
        assert!(text.parse::<InflightPlace>().is_err(), "{text}");
    }
    other.mark_taken("77.88.99".parse().unwrap());
}

#[test]
fn a_dead_childs_rows_are_readable_until_buried_and_its_counters_stay() {
    let (board, other) = pair();
    let row = board.child(0).unwrap();
    row.claim(&claim(1));
    let key = SeriesKey { metric: 3, a: 1, b: 2, c: 3 };
    let worker = other.inflight_rows(0);
    let lost = worker.admit(start(8, "gone")).unwrap();
    other.series(0).unwrap().add(key, 5);
    // SIGKILL: no destructor runs.
    std::mem::forget(lost);
    assert_eq!(board.inflight(0).next().unwrap().client_id, "gone");
    board.series(0).unwrap().add(key, 1);
    board.bury(0);
    assert_eq!(board.inflight(0).count(), 0);
    assert_eq!((row.phase(), row.pid(), row.kind()), (Phase::Empty, 0, None));
    row.claim(&claim(2));
    // The next child in the row finds empty rows and goes on counting.
    let next = other.inflight_rows(0);
    let _one = next.admit(start(1, "")).unwrap();
    assert_eq!(board.inflight(0).count(), 1);
    other.series(0).unwrap().add(key, 2);
    assert_eq!(board.series(0).unwrap().get(key), 8);
    assert_eq!(board.series(0).unwrap().iter().collect::<Vec<_>>(), [(key, 8)]);
}

#[test]
fn counters_never_go_back_while_they_are_read() {
    let (board, other) = pair();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let series = other.series(1).unwrap();
            for round in 0..20_000_u16 {
                series.add(SeriesKey { metric: 1, a: round % 50, b: 0, c: 0 }, 1);
            }
            done.store(true, Ordering::Release);
        });
        let mut last = 0;
        while !done.load(Ordering::Acquire) {
            let sum: u64 = board.series(1).unwrap().iter().map(|(_, value)| value).sum();
            assert!(sum >= last);
            last = sum;
        }
    });
    let series = board.series(1).unwrap();
    assert_eq!(series.iter().map(|(_, value)| value).sum::<u64>(), 20_000);
    // 64 cells: 14 more keys find a place, the others are counted as dropped.
    for a in 1000..1020 {
        series.add(SeriesKey { metric: 1, a, b: 0, c: 0 }, 1);
    }
    assert_eq!((series.iter().count(), series.dropped()), (64, 6));
    assert!(board.series(4).is_none());
    board.master_series().unwrap().add(SeriesKey { metric: 2, a: 0, b: 0, c: 0 }, 1);
    assert_eq!(other.master_series().unwrap().iter().count(), 1);
}

#[test]
fn readers_never_see_a_mix_of_two_requests() {
    let (board, other) = pair();
    board.child(0).unwrap().claim(&claim(1));
    let done = AtomicBool::new(false);
    let seen = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let rows = other.inflight_rows(0);
            let texts = ["a".repeat(64), "b".repeat(64), String::new()];
            let mut seq = 0;
            // Until the readers have seen a good many, and at least so often.
            while seq < 50_000 || (seen.load(Ordering::Acquire) < 200 && seq < 50_000_000) {
                seq += 1;
                let which = u16::try_from(seq % 3).unwrap();
                let ticket = rows.admit(InflightStart {
                    seq,
                    epoch: 1,
                    client_id: &texts[usize::from(which)],
                    route: which,
                    key: which,
                    method: which,
                    started_ns: seq.into(),
                });
                drop(ticket.unwrap());
            }
            done.store(true, Ordering::Release);
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::Acquire) {
                    for one in board.inflight(0) {
                        let which = u16::try_from(one.seq % 3).unwrap();
                        assert_eq!((one.route, one.key, one.started_ns), (which, which, u64::from(one.seq)));
                        let expected = ["a".repeat(64), "b".repeat(64), String::new()];
                        assert_eq!(one.client_id, expected[usize::from(which)]);
                        seen.fetch_add(1, Ordering::AcqRel);
                    }
                }
            });
        }
    });
    assert!(seen.load(Ordering::Acquire) >= 200, "the readers met the writer");
}

#[test]
fn a_hosts_row_is_found_by_its_section_and_forgets_the_one_before() {
    let (board, other) = pair();
    let row = board.host(3).unwrap();
    row.claim(0xabc, "tiny");
    let seen = other.host(3).unwrap();
    assert_eq!((seen.look(0xabc), seen.name()), (Some(HostState::Cold), "tiny".into()));
    assert_eq!((seen.look(0xabd), other.host(0).unwrap().look(0)), (None, None));
    assert!(!row.take_wanted());
    seen.set_is_wanted(true);
    assert!(row.take_wanted() && !row.take_wanted());
    row.bear(9, 2);
    seen.set_ready_epoch(9);
    seen.set_in_flight(3);
    seen.set_pid(77);
    row.set_cause(&"x".repeat(300));
    assert_eq!((row.ready_epoch(), row.in_flight(), row.pid(), row.cause().len()), (9, 3, 77, 256));
    row.bear(10, 2);
    assert_eq!((row.ready_epoch(), row.in_flight(), row.pid(), row.epoch()), (0, 0, 0, 10));
    row.clear();
    assert_eq!((seen.look(0xabc), seen.name(), seen.cause()), (None, String::new(), String::new()));
    assert!(board.host(HOSTS_MAX).is_none());
    assert_eq!(board.hosts().count(), usize::try_from(HOSTS_MAX).unwrap());
}

/// A row goes from one section to another while workers look: nobody takes the one's state for the other's.
#[test]
fn a_section_never_has_the_state_of_another() {
    let (board, other) = pair();
    let done = AtomicBool::new(false);
    let seen = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let row = board.host(0).unwrap();
            let mut rounds = 0_u64;
            while rounds < 20_000 || (seen.load(Ordering::Acquire) < 200 && rounds < 20_000_000) {
                rounds += 1;
                row.claim(1, "one");
                row.set_state(HostState::Ready);
                row.claim(2, "two");
                row.set_state(HostState::Failed);
            }
            done.store(true, Ordering::Release);
        });
        for _ in 0..2 {
            scope.spawn(|| {
                let row = other.host(0).unwrap();
                while !done.load(Ordering::Acquire) {
                    for (fingerprint, never) in [(1, HostState::Failed), (2, HostState::Ready)] {
                        let state = row.look(fingerprint);
                        assert!(state != Some(never) && state != Some(HostState::Empty), "{fingerprint} {state:?}");
                        seen.fetch_add(u64::from(state.is_some()), Ordering::AcqRel);
                    }
                }
            });
        }
    });
    assert!(seen.load(Ordering::Acquire) >= 200, "the readers met the writer");
}

#[test]
fn s24_what_is_no_board_of_this_build_is_refused() {
    let foreign = |fd: OwnedFd| match Board::attach(fd) {
        Err(Error::Foreign(what)) => what,
        other => panic!("{other:?}"),
    };
    // Not sealed: it could shrink under a reader, whose next access would be a SIGBUS.
    let open = evergate_sys::memfd(c"open").unwrap();
    rustix::fs::ftruncate(&open, 8192).unwrap();
    assert_eq!(foreign(open), "its size is not sealed");
    let short = evergate_sys::memfd(c"short").unwrap();
    evergate_sys::seal_size(&short).unwrap();
    assert_eq!(foreign(short), "too short");

    let image = |change: &dyn Fn(&mut Vec<u8>)| {
        let board = Board::create(SHAPE, 1).unwrap();
        let mut bytes = vec![0; usize::try_from(rustix::fs::fstat(board.fd()).unwrap().st_size).unwrap()];
        rustix::io::pread(board.fd(), bytes.as_mut_slice(), 0).unwrap();
        change(&mut bytes);
        let mut file = std::fs::File::from(evergate_sys::memfd(c"image").unwrap());
        file.write_all(&bytes).unwrap();
        evergate_sys::seal_size(file.as_fd()).unwrap();
        OwnedFd::from(file)
    };
    assert!(Board::attach(image(&|_| {})).is_ok());
    assert_eq!(foreign(image(&|bytes| bytes[0] ^= 1)), "wrong magic");
    assert_eq!(foreign(image(&|bytes| bytes[8] ^= 1)), "another layout version");
    assert_eq!(foreign(image(&|bytes| bytes.truncate(bytes.len() - 4096))), "its size does not fit its shape");
    // Children, slots, series and labels beyond all bounds.
    for at in [32, 40, 48, 56] {
        assert_eq!(foreign(image(&|bytes| bytes[at + 5] = 1)), "its shape is out of range");
    }
    assert!(matches!(Board::create(Shape { children: 0, ..SHAPE }, 1), Err(Error::Shape(_))));
}
