use super::*;

const ENDED: Ended = Ended {
    how: How::Broken,
    is_visible: false,
    is_last: false,
    cancelled: None,
    has_time: true,
    retry_unknown: false,
};

/// Every way to fail, and whether the next target is tried: without and with `retry_unknown`.
const TABLE: [(How, [bool; 2]); 30] = [
    (How::Full, [true, true]),
    (How::NotReached, [true, true]),
    (How::NotReady, [true, true]),
    (How::Unanswered, [false, true]),
    (How::Slow, [true, true]),
    (How::Broken, [true, true]),
    (How::TooLarge, [false, false]),
    (How::OutOfTime, [false, false]),
    (How::Ours, [false, false]),
    (How::Status(100), [true, true]),
    (How::Status(101), [true, true]),
    (How::Status(300), [false, false]),
    (How::Status(301), [false, false]),
    (How::Status(307), [false, false]),
    (How::Status(399), [false, false]),
    (How::Status(400), [false, false]),
    (How::NotAccepted, [true, true]),
    (How::Status(402), [false, false]),
    (How::Status(404), [false, false]),
    (How::Status(408), [false, false]),
    (How::Status(409), [false, false]),
    (How::Status(413), [false, false]),
    (How::Status(422), [false, false]),
    (How::Status(428), [false, false]),
    (How::Status(429), [true, true]),
    (How::Status(499), [false, false]),
    (How::Status(500), [true, true]),
    (How::Status(503), [true, true]),
    (How::Status(529), [true, true]),
    (How::Status(999), [true, true]),
];

#[test]
fn the_next_target_is_tried_as_the_table_says_and_only_with_time_and_nothing_said() {
    let causes = [None, Some(Cause::ClientGone), Some(Cause::Draining), Some(Cause::DeadlinePassed)];
    let both = [false, true];
    for (how, goes_on) in TABLE {
        for (index, retry_unknown) in both.into_iter().enumerate() {
            for (is_visible, is_last) in both.into_iter().flat_map(|one| both.map(|other| (one, other))) {
                for (has_time, cancelled) in both.into_iter().flat_map(|one| causes.map(|other| (one, other))) {
                    let found = next(&Ended { how, is_visible, is_last, cancelled, has_time, retry_unknown });
                    let expected = match (cancelled, is_visible || !goes_on[index]) {
                        (Some(cause), _) => Next::Cancelled(cause),
                        (None, true) => Next::This,
                        (None, false) if is_last => Next::Best,
                        (None, false) if !has_time && how == How::NotReady => Next::This,
                        (None, false) if !has_time => Next::OutOfTime,
                        (None, false) => Next::Target,
                    };
                    let case = (how, retry_unknown, is_visible, is_last, has_time, cancelled);
                    assert_eq!(found, expected, "{case:?}");
                }
            }
        }
    }
}

#[test]
fn every_fault_of_an_attempt_is_of_one_kind_by_how_far_it_came() {
    use Reached::{Answer, Nothing, Request};
    for reached in [Nothing, Request, Answer] {
        for fault in Fault::ALL.iter().copied() {
            let expected = match (reached, fault) {
                (_, Fault::Internal) => How::Ours,
                (_, Fault::DeadlineExceeded) => How::OutOfTime,
                (Nothing, Fault::ModelLoading | Fault::Overloaded) => How::NotReady,
                (Nothing, _) => How::NotReached,
                (Request, Fault::UpstreamDisconnected) => How::Unanswered,
                (_, Fault::UpstreamTimeout | Fault::FirstTokenTimeout) => How::Slow,
                _ => How::Broken,
            };
            assert_eq!(How::of(reached, fault), expected, "{reached:?} {fault:?}");
        }
    }
    // What is cut off once it has begun is no riddle: it was no answer.
    assert_eq!(How::of(Answer, Fault::UpstreamDisconnected), How::Broken);
}

#[test]
fn r3_what_the_client_has_is_never_taken_back() {
    for (how, _) in TABLE {
        assert_eq!(next(&Ended { how, is_visible: true, retry_unknown: true, ..ENDED }), Next::This, "{how:?}");
    }
}

fn error(fault: Fault, message: &'static str) -> Error {
    Error::new(fault, message)
}

fn limited(retry_after_s: Option<u32>) -> Error {
    Error { retry_after_s, ..error(Fault::RateLimitExceeded, "wait") }
}

fn told(errors: Vec<Error>) -> Error {
    let mut verdict = Verdict::default();
    errors.into_iter().for_each(|error| verdict.add(error));
    verdict.into_error()
}

#[test]
fn the_last_failure_that_may_pass_is_told() {
    let failed = || error(Fault::UpstreamFailed, "first");
    assert_eq!(told(vec![failed(), error(Fault::UpstreamConnectFailed, "second")]).message, "second");
    // One that stays, such as a credential that is refused, does not hide one that may pass.
    assert_eq!(told(vec![failed(), error(Fault::UpstreamAuthFailed, "second")]).message, "first");
    assert_eq!(told(vec![error(Fault::UpstreamAuthFailed, "a"), error(Fault::UpstreamAuthFailed, "b")]).message, "b");
    assert_eq!(told(vec![failed()]).message, "first");
    assert_eq!(told(vec![]).fault, Fault::Internal);
}

#[test]
fn e3_a_429_is_told_only_if_nobody_else_may_recover_and_with_the_shortest_wait() {
    let wait = |errors| {
        let told = told(errors);
        (told.fault, told.retry_after_s)
    };
    let limit = Fault::RateLimitExceeded;
    assert_eq!(wait(vec![limited(Some(7)), limited(Some(3)), limited(Some(9))]), (limit, Some(3)));
    // Without a word of its own an upstream means the table's second.
    assert_eq!(wait(vec![limited(Some(7)), limited(None)]), (limit, None));
    assert_eq!(wait(vec![limited(None), limited(Some(7))]), (limit, None));
    assert_eq!(wait(vec![limited(Some(300)), limited(Some(2))]), (limit, Some(2)));
    assert_eq!(wait(vec![error(Fault::UpstreamAuthFailed, ""), limited(Some(4))]), (limit, Some(4)));
    assert_eq!(wait(vec![limited(Some(4)), error(Fault::UpstreamAuthFailed, "")]), (limit, Some(4)));
    assert_eq!(wait(vec![limited(Some(4)), error(Fault::UpstreamFailed, "")]), (Fault::UpstreamFailed, None));
    assert_eq!(wait(vec![error(Fault::UpstreamFailed, ""), limited(Some(4))]), (Fault::UpstreamFailed, None));
}

#[test]
fn the_message_names_who_was_tried_unless_it_is_the_upstreams_own() {
    let mut failed = error(Fault::UpstreamFailed, "it failed");
    name_tried(&mut failed, [("a", "upstream_failed"), ("b", "upstream_timeout")].into_iter());
    assert_eq!(failed.message, "it failed; tried: a (upstream_failed), b (upstream_timeout)");
    let mut refused = error(Fault::UpstreamRefused, "too many tokens");
    name_tried(&mut refused, [("a", "upstream_failed")].into_iter());
    assert_eq!(refused.message, "too many tokens");
    let mut alone = error(Fault::UpstreamFailed, "it failed");
    name_tried(&mut alone, std::iter::empty());
    assert_eq!(alone.message, "it failed");
}
