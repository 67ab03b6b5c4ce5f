//! Every secret is a marker of its own, everything that can fail fails, and then no marker stands in anything that the
//! program has said or left: answers, standard error, records, status, metrics, the board, what children were given.

use std::fmt::Write as _;
use std::io::Read;

use evergate_testkit::driver::is_alive;
use evergate_testkit::raw::{Response, chat_body, get_request, post_request};
use evergate_testkit::traces::traces_of;
use evergate_testkit::{Evergate, FakeUpstream, Identity, Raw, gateway_config, wait_for, wait_until};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{CHAT, EXE, LIMIT, before, send, via, wait_ready};

const UPSTREAM: &str = "cnryUp/+7f3a9d2e5b8c1046=Qz";
const TEAM: &str = "cnryTeam.51c0ffee77ab9210dd";
const FILED: &str = "cnryFile~8de1b0a4c37f66920b/";
const DEFAULT: &str = "cnryEnv-0b5e8f12aa6d4c7793==";

/// Everything that was said, by where.
#[derive(Default)]
struct Said(Vec<(String, String)>);

impl Said {
    fn add(&mut self, place: impl Into<String>, text: impl Into<String>) {
        self.0.push((place.into(), text.into()));
    }

    fn answer(&mut self, place: &str, response: &Response) {
        let mut text = response.text();
        for (name, value) in &response.headers {
            let _ = write!(text, "\n{name}: {value}");
        }
        self.add(format!("an answer: {place}"), text);
    }

    /// Everything that can be read of a gateway from outside and from beside it.
    fn gateway(&mut self, gateway: &Evergate) {
        self.commands(gateway);
        self.add("metrics", gateway.metrics());
        self.add("/status", evergate_testkit::get(&gateway.admin(), "/status").text());
        for child in gateway.children() {
            for file in ["cmdline", "environ"] {
                let bytes = std::fs::read(format!("/proc/{}/{file}", child.pid)).unwrap_or_default();
                self.add(format!("{file} of the {}", child.kind), String::from_utf8_lossy(&bytes));
            }
        }
        self.add("the master's cmdline", std::fs::read_to_string(format!("/proc/{}/cmdline", gateway.pid())).unwrap());
        self.add("the board", board(gateway.pid()));
        self.words(gateway);
    }

    /// What its commands print, the requests in flight among it.
    fn commands(&mut self, gateway: &Evergate) {
        for words in
            ["status --json", "status", "exits --json", "exits", "access --json", "access", "models --json", "models"]
        {
            let output = gateway.cli(&words.split(' ').collect::<Vec<_>>());
            assert!(output.status.success(), "{words}");
            self.add(words, String::from_utf8_lossy(&output.stdout));
            self.add(format!("{words}, stderr"), String::from_utf8_lossy(&output.stderr));
        }
    }

    /// What it has said and left, also after its end.
    fn words(&mut self, gateway: &Evergate) {
        self.add("stderr", if is_alive(gateway.pid()) { gateway.stderr() } else { gateway.last_words() });
        self.add("stdout", gateway.stdout());
        for entry in std::fs::read_dir(gateway.state_dir()).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap_or_default();
            self.add(path.display().to_string(), String::from_utf8_lossy(&bytes));
        }
    }

    fn assert_clean(&self, secrets: &[&str]) {
        for secret in secrets {
            for trace in traces_of(secret) {
                for (place, text) in &self.0 {
                    if let Some(at) = text.find(&trace) {
                        let around: String =
                            text[..at].chars().rev().take(80).collect::<Vec<_>>().iter().rev().collect();
                        panic!("{secret} as {trace} in {place}: ...{around}<HERE>");
                    }
                }
            }
        }
    }
}

/// The shared memory, as a process of the same user could read it.
fn board(master: i32) -> String {
    for entry in std::fs::read_dir(format!("/proc/{master}/fd")).unwrap() {
        let path = entry.unwrap().path();
        if std::fs::read_link(&path).is_ok_and(|name| name.to_string_lossy().contains("evergate-board")) {
            let mut bytes = Vec::new();
            std::fs::File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
            bytes.retain(|byte| *byte != 0);
            assert!(bytes.len() > 100, "an empty board tells nothing: {}", bytes.len());
            return String::from_utf8_lossy(&bytes).into_owned();
        }
    }
    panic!("no board");
}

fn config(fake: &FakeUpstream, more: &str) -> String {
    let text = gateway_config(fake.base_url(), &[], more);
    let text = text.replace("[server]\n", "[server]\nauth = \"keys\"\n");
    text.replace("dialect = \"openai\"\n", "dialect = \"openai\"\napi_key = { env = \"UPSTREAM_KEY\" }\n")
}

const KEYS: &str = "[keys.team]\nsecret = { env = \"TEAM_KEY\" }\n[keys.filed]\nsecret = { file = \"filed\" }\n\
                    [workers]\nmin = 2\nmax = 2\n[timeouts]\nfirst_token = \"1s\"\n";

fn ask(gateway: &Evergate, key: &str, fields: &str, model: &str, stream: bool) -> Result<Response, String> {
    let mut raw = Raw::connect(&gateway.addr());
    let fields = format!("authorization: Bearer {key}\r\n{fields}");
    raw.send(&post_request(CHAT, &fields, &chat_body(model, stream, &Value::Null)));
    raw.try_read_response(LIMIT)
}

/// Everything that an upstream, a client and chance can do wrong.
fn drive(gateway: &Evergate, fake: &FakeUpstream, said: &mut Said) {
    for status in [200, 400, 401, 403, 404, 422, 429, 500, 502] {
        for stream in [false, true] {
            let model = via(&format!("leak-{status}"));
            let response = ask(gateway, TEAM, "", &model, stream).unwrap();
            // It has said something, and the words around are there.
            let is_quoted = matches!(status, 200 | 400 | 404 | 422 | 429);
            assert_eq!(response.text().contains("[redacted]"), is_quoted, "{model}: {}", response.text());
            said.answer(&model, &response);
        }
    }
    for script in
        ["echo-request", "reset-early", "eof-mid", "html", "bad-json", "redirect", "error-event-mid", "silent"]
    {
        for stream in [false, true] {
            // `silent` has no limit but the whole time as a unary request.
            if script == "silent" && !stream {
                continue;
            }
            // What an upstream answers rightly is passed on as it is: that it quotes our key is the test's own doing.
            if let Ok(response) = ask(gateway, FILED, "", &via(script), stream)
                && script != "echo-request"
            {
                said.answer(script, &response);
            }
        }
    }
    let near = &TEAM[..TEAM.len() - 1];
    for key in [near, "", UPSTREAM, &format!("{TEAM}x"), &TEAM.to_uppercase()] {
        let response = ask(gateway, key, "", "echo", false).unwrap();
        assert_eq!(response.status, 401);
        said.answer("a wrong key", &response);
    }
    // A key where it does not belong.
    said.answer("a key for a model", &ask(gateway, TEAM, "", TEAM, false).unwrap());
    // At once: later requests write over the same rows.
    said.add("the board after a key for a model", board(gateway.pid()));
    for request in [
        get_request(&format!("/v1/models/{TEAM}"), &format!("authorization: Bearer {TEAM}\r\n")),
        get_request(&format!("/v1?key={TEAM}"), &format!("authorization: Bearer {TEAM}\r\n")),
        post_request(CHAT, &format!("authorization: Bearer {TEAM}\r\n"), &format!("{{\"model\": {TEAM}")),
        post_request(CHAT, &format!("authorization: Bearer {TEAM}\r\nauthorization: Bearer {FILED}\r\n"), "{}"),
        post_request(CHAT, &format!("authorization: {TEAM}\r\n"), "{}"),
        format!("GET / HTTP/1.1\r\nHost: x\r\nAuthorization : Bearer {TEAM}\r\n\r\n").into_bytes(),
    ] {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&request);
        if let Ok(response) = raw.try_read_response(LIMIT) {
            said.answer(&String::from_utf8_lossy(&request), &response);
        }
    }
    for (key, word) in [(TEAM, TEAM), (TEAM, &TEAM[9..]), (FILED, TEAM)] {
        misplace(gateway, fake, (key, word), said);
    }
    // In base64, as it may stand in an id.
    let coded = evergate_testkit::traces::base64(UPSTREAM.as_bytes()).replace('+', "-").replace(['/', '='], "_");
    misplace(gateway, fake, (TEAM, &coded), said);
    let response = ask(gateway, "wrong", &format!("x-request-id: {TEAM}\r\n"), "echo", false).unwrap();
    assert_eq!(response.status, 401);
    said.answer("a key for an id, with a wrong one", &response);
    for fault in ["panic-head", "panic-handler", "panic-stream", "panic-connection", "exit-3", "double-panic", "abort"]
    {
        let fields = format!("x-evergate-fault: {fault}\r\nx-request-id: {fault}\r\n");
        if let Ok(response) = ask(gateway, TEAM, &fields, &via("stream-5"), fault == "panic-stream") {
            said.answer(fault, &response);
        }
        wait_ready(gateway, 2);
    }
}

/// A request whose client has put `word` wherever a word of its own fits. Its fate is that of `script`.
fn misplaced(key: &str, word: &str, script: &str, stream: bool) -> Vec<u8> {
    let body = json!({
        "model": format!("fake/{script}:{word}"), "stream": stream, "user": word, "metadata": { "team": word, word: 1 },
        "messages": [{ "role": "user", "content": word }],
    });
    let fields = format!(
        "authorization: Bearer {key}\r\nx-request-id: {word}\r\ntraceparent: 00-{word}-01\r\ntracestate: us={word}\r\n\
         user-agent: {word}\r\nidempotency-key: {word}\r\nx-request-timeout: 30\r\n"
    );
    post_request(&format!("{CHAT}?key={word}"), &fields, &body.to_string())
}

/// A key that stands where a word of its client's should: in requests that go well, fail, are under way and die.
fn misplace(gateway: &Evergate, fake: &FakeUpstream, (key, word): (&str, &str), said: &mut Said) {
    let send_one = |script: &str, stream| {
        let mut raw = Raw::connect(&gateway.addr());
        raw.send(&misplaced(key, word, script, stream));
        raw
    };
    for (script, stream) in
        [("ok", false), ("stream-3", true), ("status-400", false), ("status-500", false), ("error-event-mid", true)]
    {
        let response = send_one(script, stream).read_response(LIMIT);
        let own = response.header("x-request-id").unwrap().to_owned();
        assert!(own.starts_with("req_"), "it is echoed: {own}");
        let record = gateway.wait_access(&own, LIMIT);
        assert_eq!((&record["client_id"], &record["model"]), (&json!(""), &json!("[redacted]")), "{record}");
    }
    let index = fake.request_count();
    let (unary, stream) = (send_one("hold", false), send_one("hold-mid", true));
    let _ = (fake.wait_request(index, LIMIT), fake.wait_request(index + 1, LIMIT));
    said.commands(gateway);
    said.add("the board with the two", board(gateway.pid()));
    let lost = |record: &Value| record["lost"].as_array().is_some_and(|all| !all.is_empty());
    let before = gateway.exits().into_iter().filter(|record| lost(record)).count();
    gateway.workers().into_iter().for_each(|pid| send(pid, Signal::KILL));
    drop((unary, stream));
    let _ = gateway.wait_exits(before + 1, LIMIT, lost);
    wait_ready(gateway, 2);
    said.add("the board after their death", board(gateway.pid()));
}

/// A token that the gateway does not know is its client's secret all the same.
#[test]
fn a_clients_own_token_stands_in_nothing_that_is_said_or_left() {
    const OWN: &str = "cnryOwn.7d20e1c9b3f844aa5d16";
    let fake = FakeUpstream::start();
    let mut gateway = before(&fake, "[workers]\nmin = 2\nmax = 2\n");
    let mut said = Said::default();
    misplace(&gateway, &fake, (OWN, OWN), &mut said);
    // By a part of it, and under another scheme.
    misplace(&gateway, &fake, (OWN, &OWN[..18]), &mut said);
    let mut raw = Raw::connect(&gateway.addr());
    raw.send(&post_request(CHAT, &format!("authorization: Basic {OWN}\r\nx-request-id: {OWN}\r\n"), "{"));
    assert!(raw.read_response(LIMIT).header("x-request-id").unwrap().starts_with("req_"));
    said.gateway(&gateway);
    gateway.signal(Signal::TERM);
    let _ = gateway.wait_exit(LIMIT);
    said.words(&gateway);
    said.assert_clean(&[OWN]);
}

/// Configurations with a secret in every wrong place.
fn mistakes(fake: &FakeUpstream) -> Vec<String> {
    let good = config(fake, KEYS);
    vec![
        good.replace("{ env = \"UPSTREAM_KEY\" }", &format!("\"{UPSTREAM}\"")),
        good.replace("{ env = \"UPSTREAM_KEY\" }", &format!("{{ env = \"{UPSTREAM}\" }}")),
        good.replace("{ env = \"UPSTREAM_KEY\" }", &format!("{{ value = \"{UPSTREAM}\" }}")),
        good.replace("http://", &format!("http://user:{}@", TEAM)),
        good.replace("api_key = ", &format!("api_kye = \"{UPSTREAM}\"\napi_key = ")),
        good.replace("api_key = ", &format!("headers = {{ authorization = \"{UPSTREAM}\" }}\napi_key = ")),
        good.replace("{ env = \"TEAM_KEY\" }", &format!("\"{TEAM}")),
    ]
}

#[test]
fn no_secret_stands_in_anything_that_is_said_or_left() {
    let fake = FakeUpstream::start();
    let folder = tempfile::tempdir().unwrap();
    let start = || {
        Evergate::builder(EXE)
            .config(config(&fake, KEYS))
            .state_dir(folder.path())
            .file("filed", FILED)
            .env("UPSTREAM_KEY", UPSTREAM)
            .env("TEAM_KEY", TEAM)
            .env("EVERGATE_FAULT", "1")
    };
    let mut said = Said::default();
    let mut gateway = start().start();
    drive(&gateway, &fake, &mut said);
    assert_eq!(fake.wait_request(0, LIMIT).request.bearer(), UPSTREAM, "the upstream had something to tell");
    let good = config(&fake, KEYS);
    for text in mistakes(&fake) {
        gateway.write("evergate.toml", &text);
        let reload = gateway.cli(&["reload"]);
        assert_ne!(reload.status.code(), Some(0), "a mistake was taken: {text}");
        said.add(
            "a refused reload",
            format!("{}{}", String::from_utf8_lossy(&reload.stdout), String::from_utf8_lossy(&reload.stderr)),
        );
    }
    gateway.write("evergate.toml", &good);
    assert_eq!(gateway.cli(&["reload"]).status.code(), Some(0));
    // A reload ends the clerk before the next one is started.
    let clerk = || gateway.children().into_iter().find(|child| child.kind == "clerk");
    send(wait_for("a clerk", LIMIT, clerk).pid, Signal::KILL);
    wait_ready(&gateway, 2);
    said.gateway(&gateway);
    gateway.signal(Signal::TERM);
    let _ = gateway.wait_exit(LIMIT);
    said.words(&gateway);
    for text in mistakes(&fake) {
        let Err(ended) = start().config(text.clone()).try_start() else { panic!("a mistake was taken: {text}") };
        said.add("a refused start", ended.stderr);
    }
    said.assert_clean(&[UPSTREAM, TEAM, FILED]);
}

/// The key of the environment, and the private key of the listener.
#[test]
fn no_private_key_stands_in_anything_that_is_said_or_left() {
    let identity = Identity::generate();
    let client = identity.client_config(&[]);
    let text = "[server]\nlisten = [\"127.0.0.1:0\"]\ntls = { cert = \"cert.pem\", key = \"key.pem\" }\n\
                [admin]\nlisten = \"127.0.0.1:0\"\n[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let mut gateway = Evergate::builder(EXE)
        .config(text)
        .file("cert.pem", &identity.cert_pem)
        .file("key.pem", &identity.key_pem)
        .env("EVERGATE_API_KEY", DEFAULT)
        .tls(&client)
        .start();
    let mut said = Said::default();
    for key in [DEFAULT, &DEFAULT[..27], "no-key-at-all"] {
        let mut raw = Raw::connect_tls(&gateway.addr(), &client);
        raw.send(&get_request("/v1/models", &format!("authorization: Bearer {key}\r\n")));
        let response = raw.read_response(LIMIT);
        assert_eq!(response.status, if key == DEFAULT { 200 } else { 401 });
        said.answer(key, &response);
    }
    let mut plain = Raw::connect(&gateway.addr());
    plain.send(&get_request("/v1/models", &format!("authorization: Bearer {DEFAULT}\r\n")));
    drop(plain.try_read_response(LIMIT));
    let lines: Vec<&str> = identity.key_pem.lines().filter(|line| line.len() > 24 && !line.starts_with('-')).collect();
    assert!(!lines.is_empty());
    // A certificate for a key, and half a key.
    for key in [identity.cert_pem.clone(), identity.key_pem.replace(lines[0], &lines[0][..20])] {
        gateway.write("key.pem", &key);
        let reload = gateway.cli(&["reload"]);
        assert_ne!(reload.status.code(), Some(0));
        said.add("a refused reload", String::from_utf8_lossy(&reload.stderr));
    }
    gateway.write("key.pem", &identity.key_pem);
    gateway.kill_worker(0);
    wait_until("the record", LIMIT, || !gateway.exits().is_empty());
    said.gateway(&gateway);
    gateway.signal(Signal::TERM);
    let _ = gateway.wait_exit(LIMIT);
    said.words(&gateway);
    said.assert_clean(&[DEFAULT]);
    said.assert_clean(&lines);
}
