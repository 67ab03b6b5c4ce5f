use super::*;

const MS: Duration = Duration::from_millis(1);
const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
const TWO: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

fn starts(book: &mut Book, host: &str, now: Instant) -> Job {
    match book.ask(host, now) {
        (Answer::Wait { .. }, Some(job)) => job,
        other => panic!("{other:?}"),
    }
}

/// Waits for the look-up of somebody else.
fn waits(book: &mut Book, host: &str, now: Instant) -> watch::Receiver<()> {
    match book.ask(host, now) {
        (Answer::Wait { ended, .. }, None) => ended,
        other => panic!("{other:?}"),
    }
}

fn known(book: &mut Book, host: &str, now: Instant) -> IpAddr {
    match book.ask(host, now) {
        (Answer::Known(addresses), None) => addresses[0],
        other => panic!("{other:?}"),
    }
}

fn fails(book: &mut Book, host: &str, now: Instant) {
    assert!(matches!(book.ask(host, now), (Answer::Failed(_), None)));
}

#[test]
fn one_name_is_looked_up_once_for_everybody() {
    let (mut book, now) = (Book::default(), Instant::now());
    let job = starts(&mut book, "a", now);
    let waiting: Vec<_> = (0..500).map(|_| waits(&mut book, "a", now)).collect();
    assert!(waiting.iter().all(|ended| ended.has_changed().is_ok()));
    assert!(book.end(&job, Ok(vec![ONE]), now).is_none());
    // Closed: everybody is woken.
    assert!(waiting.iter().all(|ended| ended.has_changed().is_err()));
    assert_eq!(known(&mut book, "a", now), ONE);
}

#[test]
fn addresses_are_used_for_their_time_and_a_failure_for_a_second() {
    let (mut book, now) = (Book::default(), Instant::now());
    let job = starts(&mut book, "a", now);
    book.end(&job, Ok(vec![ONE]), now);
    assert_eq!(known(&mut book, "a", now + FRESH - MS), ONE);
    let job = starts(&mut book, "a", now + FRESH);
    book.end(&job, Ok(vec![TWO]), now + FRESH);
    assert_eq!(known(&mut book, "a", now + FRESH), TWO);

    let job = starts(&mut book, "b", now);
    book.end(&job, Err("gone".into()), now);
    fails(&mut book, "b", now + FAILED - MS);
    let _ = starts(&mut book, "b", now + FAILED);
}

/// D1.
#[test]
fn last_good_addresses_outlive_a_resolver_that_fails() {
    let (mut book, mut now) = (Book::default(), Instant::now());
    let job = starts(&mut book, "a", now);
    book.end(&job, Ok(vec![ONE]), now);
    for _ in 0..3 {
        now += FRESH;
        let job = starts(&mut book, "a", now);
        book.end(&job, Err("down".into()), now);
        assert_eq!(known(&mut book, "a", now), ONE);
    }
}

/// D1, D2: who has old addresses waits a moment for new ones, and nobody after that.
#[test]
fn last_good_addresses_outlive_a_resolver_that_is_silent() {
    let (mut book, mut now) = (Book::default(), Instant::now());
    let job = starts(&mut book, "a", now);
    book.end(&job, Ok(vec![ONE]), now);
    now += FRESH;
    let (answer, job) = book.ask("a", now);
    let Answer::Wait { patience, .. } = answer else { panic!("{answer:?}") };
    assert_eq!((patience, job.is_some()), (Some(now + REFRESH), true));
    let _ = waits(&mut book, "a", now + REFRESH - MS);
    let first = book.overrun("a");
    assert_eq!((first.known.as_deref(), first.is_first), (Some(&[ONE][..]), true));
    assert!(!book.overrun("a").is_first);
    assert_eq!(known(&mut book, "a", now + REFRESH), ONE);
    // Late is better than never.
    book.end(&job.unwrap(), Ok(vec![TWO]), now + 9 * REFRESH);
    assert_eq!(known(&mut book, "a", now + 9 * REFRESH), TWO);
}

#[test]
fn look_ups_beyond_the_threads_wait_in_line_and_unwanted_ones_are_dropped() {
    let (mut book, now) = (Book::default(), Instant::now());
    let jobs: Vec<Job> = (0..LOOKUPS_MAX).map(|n| starts(&mut book, &format!("n{n}"), now)).collect();
    let left = waits(&mut book, "left", now);
    let wanted = waits(&mut book, "wanted", now);
    drop(left);
    let next = book.end(&jobs[0], Err("gone".into()), now).unwrap();
    assert_eq!(next.host, "wanted");
    assert_eq!(book.running, LOOKUPS_MAX);
    drop(wanted);
    // Nobody had waited for it any more, so it is asked for anew.
    assert!(book.end(&next, Ok(vec![ONE]), now).is_none());
    let _ = starts(&mut book, "left", now);
}

/// A name whose look-up never ends is asked for once more, and never holds more than its share.
#[test]
fn a_stuck_look_up_is_given_up_once() {
    let (mut book, now) = (Book::default(), Instant::now());
    let stuck = starts(&mut book, "a", now);
    let _ = waits(&mut book, "a", now + STUCK - MS);
    let second = starts(&mut book, "a", now + STUCK);
    assert_eq!(book.running, 2);
    let _ = waits(&mut book, "a", now + 9 * STUCK);
    assert_eq!(book.running, 2);
    // The one that was given up ends after all: what it found counts, and the other is still waited for.
    book.end(&stuck, Err("gone".into()), now + 9 * STUCK);
    assert!(book.names["a"].flight.is_some());
    book.end(&second, Ok(vec![ONE]), now + 9 * STUCK);
    assert_eq!((known(&mut book, "a", now + 9 * STUCK), book.running), (ONE, 0));
}

#[test]
fn the_line_holds_a_name_once() {
    let (mut book, mut now) = (Book::default(), Instant::now());
    for n in 0..LOOKUPS_MAX {
        let _ = starts(&mut book, &format!("n{n}"), now);
    }
    for _ in 0..5 {
        let _ = waits(&mut book, "queued", now);
        now += STUCK;
    }
    assert_eq!(book.queue.len(), 1);
}
