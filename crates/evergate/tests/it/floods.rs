//! Floods that must not fill anything: names that clients invent, and errors without end.

use std::collections::BTreeSet;

use evergate_testkit::raw::{chat_body, get, get_request, post_chat, post_request};
use evergate_testkit::{Evergate, FakeUpstream, Raw, wait_until};
use rustix::process::Signal;
use serde_json::Value;

use crate::support::{CHAT, LIMIT, ONE_WORKER, before};

/// The series on the page: names with their labels.
fn series(gateway: &Evergate) -> BTreeSet<String> {
    let metrics = gateway.metrics();
    metrics
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap().0.to_owned())
        .collect()
}

/// One round of what a client can invent: models, ids, paths, methods, users.
fn invent(gateway: &Evergate, round: usize) {
    let address = gateway.addr();
    assert_eq!(post_chat(&address, &format!("model-{round}"), false, &Value::Null).status, 404);
    assert_eq!(post_chat(&address, &format!("fake/delay-{}", round % 7), false, &Value::Null).status, 200);
    let user = serde_json::json!({"user": format!("user-{round}"), "metadata": {"k": round}});
    assert_eq!(post_chat(&address, &format!("fake/stream-{}", 1 + round % 5), true, &user).status, 200);
    assert_eq!(get(&address, &format!("/v1/invented/{round}")).status, 404);
    assert_eq!(get(&address, &format!("/v1/models/model-{round}")).status, 404);
    let mut raw = Raw::connect(&address);
    let fields = format!("x-request-id: id-{round}\r\nuser-agent: agent-{round}\r\n");
    raw.send(&post_request(CHAT, &fields, &chat_body("fake/ok", false, &Value::Null)));
    assert_eq!(raw.read_response(LIMIT).status, 200);
    let mut raw = Raw::connect(&address);
    let odd = String::from_utf8(get_request("/v1/models", "")).unwrap().replacen("GET", &format!("BREW{round}"), 1);
    raw.send(odd.as_bytes());
    assert_eq!(raw.read_response(LIMIT).status, 405);
}

/// L9: whatever clients call their models, users and requests, the page of metrics does not grow.
#[test]
fn l9_names_that_clients_invent_make_no_series() {
    let fake = FakeUpstream::start();
    let gateway = before(&fake, ONE_WORKER);
    (0..10).for_each(|round| invent(&gateway, round));
    let before = series(&gateway);
    assert!(
        before.iter().any(|one| one.contains("model=\"other\"")) && before.iter().any(|one| one.contains("fake/*"))
    );
    (10..110).for_each(|round| invent(&gateway, round));
    // Times fall into buckets that may be there for the first time; they are all on the page from the first one on.
    let after = series(&gateway);
    let new: Vec<_> = after.difference(&before).collect();
    assert!(new.is_empty(), "{new:?}");
    assert!(
        after.iter().all(|one| !one.contains("model-") && !one.contains("user-") && !one.contains("id-")),
        "{after:?}"
    );
    assert!(gateway.metrics().contains("evergate_series_dropped_total 0\n"));
}

/// L10: requests that fail without end leave a record each in the file that is rotated, and nothing on standard error.
#[test]
fn l10_an_endless_row_of_errors_says_nothing_on_stderr() {
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, ONE_WORKER);
    let said = gateway.wait_stderr("try: curl ", LIMIT);
    let scripts = ["status-500", "reset-early", "html-200", "status-401", "eof-mid", "error-event-mid"];
    let mut count = 0;
    for round in 0..300 {
        let response =
            post_chat(&gateway.addr(), &format!("fake/{}", scripts[round % 6]), round % 2 == 0, &Value::Null);
        assert!(response.status == 502 || response.text().contains("\"error\""), "{}", response.text());
        count += 1;
    }
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(b"nonsense\r\n\r\n");
    assert_eq!(raw.read_response(LIMIT).status, 400);
    wait_until("a record of each", LIMIT, || {
        let records = gateway.access();
        records.iter().filter(|record| record["route"] == CHAT).count() == count
    });
    gateway.signal(Signal::TERM);
    assert_eq!(gateway.wait_exit(LIMIT).code(), Some(0));
    // What a machine that stands still makes the master say is not about the requests.
    let is_ours = |line: &&str| !line.contains("beat") && !line.contains("stood still");
    let last_words = gateway.last_words();
    assert_eq!(last_words.lines().filter(is_ours).collect::<Vec<_>>(), said.lines().collect::<Vec<_>>());
}
