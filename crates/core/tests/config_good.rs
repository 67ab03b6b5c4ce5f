//! What a good file, or none, comes to; and that the effective configuration loads again to the same.
#![allow(clippy::panic, reason = "helpers of tests end the test")]

use std::time::Duration;

use evergate_core::config::process::{Cgroup, EnvValue, Frames, Ids, Input, Mode, Output, Replace};
use evergate_core::config::{
    Auth, Config, Facts, Loaded, OnDisconnect, Overrides, Roots, SHAPES, SecretRef, Source, Transport, duration_text,
    effective, load, parse_workers, presets, size_text,
};
use evergate_core::plan::Plan;
use proptest::prelude::*;

type Env<'a> = &'a dyn Fn(&str) -> Option<String>;

fn no_env(_: &str) -> Option<String> {
    None
}

fn secrets(name: &str) -> Option<String> {
    match name {
        "KEY_A" | "KEY_B" | "OPENAI_API_KEY" | "DEEPSEEK_API_KEY" => Some(format!("{name}-0123456789abcdef")),
        "GROQ_API_KEY" => Some(String::new()),
        "XAI_API_KEY" => Some("with space".into()),
        _ => None,
    }
}

fn with_key(name: &str) -> Option<String> {
    if name == "EVERGATE_API_KEY" { Some("0123456789abcdef0123".into()) } else { secrets(name) }
}

fn read_file(path: &str) -> Result<String, String> {
    match path {
        "conf/key" => Ok("file-secret-0123456789\r\n".into()),
        _ if path.ends_with(".pem") => Ok(format!("-----BEGIN {path}-----\n")),
        _ => Err("no such file".into()),
    }
}

fn try_with(text: Option<&str>, overrides: &Overrides, env: Env<'_>, dir: &str) -> Loaded {
    let source = text.map(|text| Source { name: "evergate.toml", text, dir });
    let facts = Facts { env, cpus: 4, read_file: &read_file };
    match load(source.as_ref(), overrides, &facts) {
        Ok(loaded) => loaded,
        Err(mistakes) => {
            let lines: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
            panic!("{}\n{}", lines.join("\n"), text.unwrap_or_default());
        }
    }
}

fn file(text: &str, env: Env<'_>) -> Loaded {
    try_with(Some(text), &Overrides::default(), env, "conf")
}

fn nothing(env: Env<'_>) -> Loaded {
    try_with(None, &Overrides::default(), env, "")
}

const FULL: &str = r#"
[server]
listen = ["0.0.0.0:8443", "unix:/run/evergate.sock", "localhost:8444"]
auth = "keys"
hosts = ["Gateway.Example.com"]
cors = ["https://app.example", "http://localhost:3000", "tauri://localhost"]
tls = { cert = "cert.pem", key = "/etc/key.pem" }

[admin]
listen = "unix:/run/admin.sock"

[keys.team-a]
secret = { env = "KEY_A" }
[keys.team-b]
secret = { file = "key" }

[workers]
min = 3
max = 0x6
slots = 1_000
boot_timeout = "1m"
hang_timeout = "2500ms"

[limits]
body = "1MB"
header = "16KiB"
headers = 64
uri = "4KiB"
json_depth = 64
connections = 100
h2_streams = 10
answer = "1GiB"
event = "1MiB"
upstream_idle = 0
queue = 12
memory_guard = false

[timeouts]
total = "10m"
stream_total = "2h"
connect = "500ms"
dns = "250ms"
write = "9s"
first_token = "90s"
idle = "1m"
head_hold = "5s"
keepalive = "20s"
header = "1s"
client_idle = "30s"
client_stall = "45s"
body_idle = "7s"
body = "1m"
upstream_idle = "10s"

[shutdown]
settle = "5s"
drain = "0s"
cancel = "2s"
cleanup = "4s"

[upstreams.local]
base_url = "http://127.0.0.1:8080/v1/"
any_model = false
in_flight_max = 4
queue = 0

[upstreams.socket]
base_url = "unix:/run/m.sock:/v1"
in_flight_max = 20

[upstreams.openai]
dialect = "openai"
base_url = "https://proxy.example.com:8443/openai"
api_key = { env = "KEY_B" }
roots = { file = "ca.pem" }

[upstreams.corp]
base_url = "https://corp.example.com"
roots = "system"

[models."gpt-4o-mini"]
targets = [ { upstream = "openai", model = "gpt-4o-mini-2024-07-18" } ]

[models."it's\"quoted\""]
targets = [ { upstream = "local" } ]

[models.safe]
targets = [ { upstream = "openai", model = "gpt-4o" }, { upstream = "corp" }, { upstream = "openai", model = "safe" } ]
retry_unknown = true
attempt = "4s"
on_disconnect = { drain = "12s" }

[models.plain]
targets = [ { upstream = "local" }, { upstream = "corp" } ]

[models.demo]
targets = [ { upstream = "echo" } ]
"#;

#[test]
fn without_a_file_it_listens_on_loopback_and_serves_echo() {
    let loaded = nothing(&no_env);
    let config = &loaded.sealed.config;
    assert_eq!(config.server.listen, ["127.0.0.1:4700"]);
    assert_eq!(config.admin_listen.as_deref(), Some("127.0.0.1:4701"));
    assert_eq!(config.server.auth, Auth::None);
    assert!(config.echo && config.models.is_empty() && config.upstreams.is_empty() && config.keys.is_empty());
    assert_eq!((config.workers.min, config.workers.max, config.workers.slots), (2, 4, 256));
    assert!(loaded.warnings.is_empty());
    assert_eq!(
        loaded.plan.banner,
        [
            "listening on {listen}",
            "models: echo",
            "metrics and status on {admin}",
            "try: curl {listen}/v1/chat/completions -H 'content-type: application/json' \
             -d '{\"model\":\"echo\",\"messages\":[{\"role\":\"user\",\"content\":\"Say hello\"}]}'",
        ]
    );
}

#[test]
fn defaults_are_those_of_the_design() {
    let config = nothing(&no_env).sealed.config;
    let (l, t, s) = (&config.limits, &config.timeouts, &config.shutdown);
    let sizes = [l.body_bytes, l.header_bytes, l.uri_bytes, l.answer_bytes, l.event_bytes].map(size_text);
    assert_eq!(sizes, ["20MiB", "32KiB", "8KiB", "32MiB", "4MiB"]);
    let counts = [l.headers, l.json_depth, l.choices, l.connections, l.h2_streams, l.upstream_idle, l.queue];
    assert_eq!(counts, [100, 128, 128, 4096, 100, 64, 256]);
    assert!(l.memory_guard);
    let times =
        [t.total, t.stream_total, t.connect, t.dns, t.write, t.first_token, t.idle, t.head_hold].map(duration_text);
    assert_eq!(times, ["5m", "1h", "5s", "2s", "30s", "1m", "2m", "10s"]);
    let times =
        [t.keepalive, t.header, t.client_idle, t.client_stall, t.body_idle, t.body, t.upstream_idle].map(duration_text);
    assert_eq!(times, ["15s", "10s", "75s", "30s", "15s", "2m", "1m"]);
    assert_eq!([s.settle, s.drain, s.cancel, s.cleanup].map(duration_text), ["0s", "20s", "1s", "3s"]);
    assert_eq!([config.workers.boot_timeout, config.workers.hang_timeout].map(duration_text), ["30s", "10s"]);
}

#[test]
fn a_full_file_is_read_to_the_last_key() {
    let loaded = file(FULL, &secrets);
    let config = &loaded.sealed.config;
    assert_eq!(config.server.listen, ["0.0.0.0:8443", "unix:/run/evergate.sock", "127.0.0.1:8444"]);
    assert_eq!(config.server.hosts, ["gateway.example.com"]);
    assert_eq!(config.server.cors, ["https://app.example", "http://localhost:3000", "tauri://localhost"]);
    assert_eq!(config.server.tls.as_ref().unwrap().cert, "conf/cert.pem");
    assert_eq!(config.server.tls.as_ref().unwrap().key, "/etc/key.pem");
    assert_eq!(config.keys["team-b"], SecretRef::File("conf/key".into()));
    assert_eq!(loaded.sealed.secret(&config.keys["team-b"]), Some("file-secret-0123456789"));
    assert_eq!(loaded.sealed.secret(&config.keys["team-a"]), Some("KEY_A-0123456789abcdef"));
    assert_eq!((config.workers.min, config.workers.max, config.workers.slots), (3, 6, 1000));
    assert_eq!(config.workers.hang_timeout, Duration::from_millis(2500));
    assert_eq!((config.limits.body_bytes, config.limits.upstream_idle, config.limits.queue), (1_000_000, 0, 12));
    assert!(!config.limits.memory_guard);
    assert_eq!(
        [config.timeouts.connect, config.timeouts.dns, config.timeouts.write],
        [500, 250, 9000].map(Duration::from_millis)
    );
    let openai = &config.upstreams["openai"];
    assert_eq!((openai.is_preset, &openai.api_key), (false, &Some(SecretRef::Env("KEY_B".into()))));
    assert_eq!(openai.roots, Roots::File("conf/ca.pem".into()));
    assert!(matches!(&openai.base_url.transport, Transport::Https { port: 8443, .. }));
    assert!(!config.upstreams["local"].any_model && config.upstreams["socket"].any_model);
    let in_flight = |name: &str| (config.upstreams[name].in_flight_max, config.upstreams[name].queue);
    assert_eq!([in_flight("local"), in_flight("socket"), in_flight("openai")], [(4, 0), (20, 20), (0, 0)]);
    assert_eq!(config.models["it's\"quoted\""].targets[0].model, "it's\"quoted\"");
    let safe = &config.models["safe"];
    let targets: Vec<_> = safe.targets.iter().map(|target| (&*target.upstream, &*target.model)).collect();
    assert_eq!(targets, [("openai", "gpt-4o"), ("corp", "safe"), ("openai", "safe")]);
    assert_eq!((safe.retry_unknown, safe.attempt), (true, Some(Duration::from_secs(4))));
    assert_eq!(safe.on_disconnect, OnDisconnect::Drain(Duration::from_secs(12)));
    let plain = &config.models["plain"];
    assert_eq!((plain.retry_unknown, plain.attempt, plain.targets.len()), (false, None, 2));
    assert!(config.echo && config.upstreams["deepseek"].is_preset);
    let files: Vec<_> = loaded.sealed.files.keys().map(String::as_str).collect();
    assert_eq!(files, ["/etc/key.pem", "conf/ca.pem", "conf/cert.pem"]);
    let plan = &loaded.plan;
    assert!(plan.is_tls && plan.listen.len() == 3 && plan.admin.is_some());
    assert_eq!(Plan::parse(&plan.to_text()).as_ref(), Ok(plan));
    let json = serde_json::to_string(&loaded.sealed).unwrap();
    assert!(serde_json::from_str::<evergate_core::config::Sealed>(&json).unwrap() == loaded.sealed);
    assert!(!format!("{loaded:?}").contains("0123456789"));
}

const PROGRAMS: &str = r#"
[upstreams.shout]
process = { mode = "command", argv = ["tr", "a-z", "A-Z"], template = "{{{last}}}", output = "lines", timeout = "10s", limits = { memory = "1GiB", cpu = "5s" } }
[upstreams.embed]
any_model = false
[upstreams.embed.process]
mode = "stdio"
argv = ["python3", "embed.py"]
dir = "models"
env = { THREADS = "2", TOKEN = { env = "KEY_A" } }
pass_env = ["CUDA_VISIBLE_DEVICES"]
max = 3
frames = "length"
requests_max = 1000
user = { uid = 1000 }
[upstreams.tiny.process]
mode = "server"
argv = ["llama-server", "--port", "{port}"]
idle_stop = "10m"
group = "gpu"
replace = "overlap"
stop = ["kill", "{pid}"]
strip = ["top_k"]
set = { temperature = 0.5, stop = ["a:b", "\"c\""], options = { n = 1, deep = true } }
sandbox = { read = ["/models"], write = [] }
cgroup = "required"
[models.tiny]
targets = [ { upstream = "tiny" } ]
"#;

#[test]
fn programs_are_read_to_the_last_key() {
    let config = file(PROGRAMS, &secrets).sealed.config;
    let program = |name: &str| config.upstreams.get(name).unwrap().process.clone().unwrap();
    let (shout, embed, tiny) = (program("shout"), program("embed"), program("tiny"));
    let Mode::Command(command) = &shout.mode else { panic!("{shout:?}") };
    assert_eq!(command.input, Input::Text(Some("{{{last}}}".into())));
    assert_eq!((command.output, command.idle), (Output::Lines, Duration::from_secs(10)));
    assert_eq!((shout.in_flight_max, shout.limits.memory, shout.limits.cpu_s), (4, Some(1 << 30), Some(5)));
    let Mode::Stdio(stdio) = &embed.mode else { panic!("{embed:?}") };
    assert_eq!((stdio.min, stdio.max, stdio.frames, stdio.requests_max), (1, 3, Frames::Length, 1000));
    assert_eq!((embed.dir.as_deref(), embed.in_flight_max), (Some("conf/models"), 1024));
    assert_eq!(embed.env.get("TOKEN"), Some(&EnvValue::Secret(SecretRef::Env("KEY_A".into()))));
    assert_eq!(embed.user, Some(Ids { uid: 1000, gid: 1000 }));
    assert_eq!((embed.cgroup, tiny.cgroup), (Cgroup::Auto, Cgroup::Required));
    let Mode::Server(server) = &tiny.mode else { panic!("{tiny:?}") };
    assert_eq!(server.set.get("stop").map(String::as_str), Some(r#"["a:b","\"c\""]"#));
    assert_eq!(server.set.get("options").map(String::as_str), Some(r#"{"deep":true,"n":1}"#));
    assert_eq!((tiny.idle_stop, tiny.replace), (Duration::from_secs(600), Replace::Overlap));
    // One letter makes it another program.
    let other = file(&PROGRAMS.replace("top_k", "top_p"), &secrets).sealed.config;
    let fingerprint = |config: &Config, name: &str| {
        config.upstreams.get(name).and_then(|upstream| Some(upstream.process.as_ref()?.fingerprint(name)))
    };
    assert_ne!(fingerprint(&config, "tiny"), fingerprint(&other, "tiny"));
    assert_eq!(fingerprint(&config, "embed"), fingerprint(&other, "embed"));
    // And the effective form loads again to the same.
    let again = try_with(Some(&effective(&config)), &Overrides::default(), &secrets, "").sealed.config;
    assert_eq!(again.upstreams, config.upstreams);
}

#[test]
fn presets_are_in_force_when_their_key_is() {
    let loaded = nothing(&secrets);
    let names: Vec<_> = loaded.sealed.config.upstreams.keys().map(String::as_str).collect();
    assert_eq!(names, ["deepseek", "openai"], "not groq, whose variable is empty, nor xai, whose key has a space");
    assert_eq!(loaded.plan.banner[1], "models: echo, deepseek/<model>, openai/<model>");
    let openai = &loaded.sealed.config.upstreams["openai"];
    assert!(openai.is_preset && openai.any_model);
    assert_eq!(loaded.sealed.secret(openai.api_key.as_ref().unwrap()), Some("OPENAI_API_KEY-0123456789abcdef"));
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].contains("\"xai\" is left out") && !loaded.warnings[0].contains("with space"));

    let with_file = file("", &secrets).sealed.config;
    assert_eq!(with_file.upstreams.len(), 2);
    assert!(!with_file.echo);
    assert!(file("[presets]\nenabled = false", &secrets).sealed.config.upstreams.is_empty());
    let replaced = "[upstreams.openai]\nbase_url = \"http://localhost:1\"";
    let replaced = file(replaced, &secrets).sealed;
    assert!(!replaced.config.upstreams["openai"].is_preset);
    assert!(!replaced.secrets.contains_key("env:OPENAI_API_KEY"), "a key nobody uses is not passed on");
}

#[test]
fn the_key_variable_turns_authentication_on() {
    let loaded = nothing(&with_key);
    assert_eq!(loaded.sealed.config.server.auth, Auth::Keys);
    assert_eq!(loaded.sealed.config.keys["default"], SecretRef::Env("EVERGATE_API_KEY".into()));
    assert!(loaded.plan.banner[3].contains(" -H \"authorization: Bearer $EVERGATE_API_KEY\" "));
    let open = Overrides { listen: Some("0.0.0.0:4700".into()), workers: None };
    assert_eq!(try_with(None, &open, &with_key, "").sealed.config.server.listen, ["0.0.0.0:4700"]);

    let both = "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"KEY_A\" }";
    assert_eq!(file(both, &with_key).sealed.config.keys.len(), 2);
    let named = "[keys.mine]\nsecret = { env = \"EVERGATE_API_KEY\" }";
    let config = file(named, &with_key).sealed.config;
    assert_eq!((config.keys.len(), config.server.auth), (1, Auth::Keys));
    assert_eq!(file("", &with_key).sealed.config.server.auth, Auth::Keys);
}

#[test]
fn flags_stand_over_the_file() {
    let text = "[server]\nlisten = \"127.0.0.1:1\"\n[workers]\nmin = 5\nmax = 6";
    let workers = |text: &str| parse_workers(text).unwrap();
    for (flag, expected) in [("2", (2, 6)), ("7", (7, 7)), ("2:4", (2, 4)), ("60:60", (60, 60))] {
        let overrides = Overrides { listen: Some("127.0.0.1:2".into()), workers: Some(workers(flag)) };
        let config = try_with(Some(text), &overrides, &no_env, "").sealed.config;
        assert_eq!((config.workers.min, config.workers.max), expected, "{flag}");
        assert_eq!(config.server.listen, ["127.0.0.1:2"]);
    }
    for text in ["", "x", "2:", ":2", "2:3:4", "-1", "2-4"] {
        assert!(parse_workers(text).is_err(), "{text}");
    }
}

#[test]
fn workers_fit_the_machine() {
    for (cpus, min, expected) in [(1, 2, (2, 2)), (8, 2, (2, 8)), (200, 2, (2, 60)), (0, 1, (1, 1)), (4, 9, (9, 9))] {
        let text = format!("[workers]\nmin = {min}");
        let source = Source { name: "x", text: &text, dir: "" };
        let facts = Facts { env: &no_env, cpus, read_file: &read_file };
        let config = load(Some(&source), &Overrides::default(), &facts).unwrap().sealed.config;
        assert_eq!((config.workers.min, config.workers.max), expected, "{cpus} CPUs");
    }
}

#[test]
fn a_free_public_port_means_a_free_admin_port() {
    let admin = |text: &str| file(text, &no_env).sealed.config.admin_listen;
    assert_eq!(admin("[server]\nlisten = \"127.0.0.1:0\"").as_deref(), Some("127.0.0.1:0"));
    assert_eq!(admin("[server]\nlisten = \"127.0.0.1:0\"\n[admin]\nlisten = \"[::1]:9\"").as_deref(), Some("[::1]:9"));
    assert_eq!(admin("[admin]\nlisten = \"\""), None);
    assert_eq!(admin("").as_deref(), Some("127.0.0.1:4701"));
    let quiet = file("[admin]\nlisten = \"\"", &no_env).plan;
    assert!(quiet.admin.is_none() && !quiet.banner.iter().any(|line| line.contains("admin")));
}

#[test]
fn the_line_to_try_fits_the_listener() {
    let last = |text: &str, env: Env<'_>| file(text, env).plan.banner.pop().unwrap();
    let echo = "[models.echo]\ntargets = [{ upstream = \"echo\" }]\n";
    let unix = last(&format!("{echo}[server]\nlisten = \"unix:/run/a b.sock\""), &no_env);
    assert!(unix.starts_with("try: curl --unix-socket '/run/a b.sock' http://localhost/v1/chat/completions"), "{unix}");
    let tls = last(&format!("{echo}[server]\ntls = {{ cert = \"c.pem\", key = \"k.pem\" }}"), &no_env);
    assert!(tls.starts_with("try: curl --cacert conf/c.pem {listen}/v1/"), "{tls}");
    let key = last("[server]\nauth = \"keys\"\n[keys.a]\nsecret = { file = \"key\" }", &secrets);
    assert!(key.contains("Bearer $(cat conf/key)\"") && key.contains("deepseek/<model>"), "{key}");
    let quote = last("[models.\"it's\"]\ntargets = [{ upstream = \"openai\" }]", &secrets);
    assert!(quote.contains(r#"-d '{"model":"it'\''s","#), "{quote}");
    let none = file("", &no_env).plan.banner;
    assert_eq!(none[1], "models: none");
    assert!(!none.iter().any(|line| line.starts_with("try:")), "nothing can be tried");
}

#[test]
fn what_is_most_likely_not_meant_is_warned_about() {
    let warned = |text: &str, part: &str| {
        let env = |name: &str| (name == "SHORT").then(|| "short".to_owned()).or_else(|| secrets(name));
        let warnings = file(text, &env).warnings;
        assert!(warnings.iter().any(|line| line.contains(part)), "{warnings:?}");
    };
    warned("[shutdown]\ndrain = \"30s\"", "evergate.toml:1:2: settle, drain, cancel and cleanup add up to 34s");
    warned("[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"SHORT\" }", "evergate.toml:3:7: the key \"a\" is");
    warned(
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\nattempt = \"10s\"\n\
         targets = [{ upstream = \"u\" }, { upstream = \"u\", model = \"y\" }]",
        "evergate.toml:4:11: a stream's head goes out after timeouts.head_hold (10s), and no other target is tried",
    );
    warned(
        "[workers]\nslots = 40\n[upstreams.u]\nbase_url = \"https://u\"\nin_flight_max = 20",
        "evergate.toml:5:17: \"in_flight_max\" and \"queue\" of \"u\" add up to 40, and a worker has 40 slots",
    );
    warned("[upstreams.u]\nbase_url = \"http://gpu1\"\napi_key = { env = \"SHORT\" }", "1:12: its api_key and every");
}

#[test]
fn the_effective_configuration_loads_again_to_the_same() {
    let again = |config: &Config, env: Env<'_>| {
        let text = effective(config);
        let same = try_with(Some(&text), &Overrides::default(), env, "").sealed.config;
        assert_eq!(&same, config, "{text}");
        assert_eq!(effective(&same), text);
        text
    };
    for env in [&no_env as Env<'_>, &secrets, &with_key] {
        again(&nothing(env).sealed.config, env);
        again(&file("", env).sealed.config, env);
        again(&file("[presets]\nenabled = false", env).sealed.config, env);
    }
    for text in [FULL, "[admin]\nlisten = \"\"", "[models.echo]\ntargets = [{ upstream = \"echo\" }]"] {
        again(&file(text, &secrets).sealed.config, &secrets);
    }
    let other_echo = "[models.echo]\ntargets = [{ upstream = \"openai\", model = \"x\" }]\n\
                      [models.demo]\ntargets = [{ upstream = \"echo\", model = \"y\" }]";
    again(&file(other_echo, &secrets).sealed.config, &secrets);
    let text = again(&file(FULL, &secrets).sealed.config, &secrets);
    assert!(!text.contains("0123456789"), "a secret's value: {text}");
}

proptest! {
    #[test]
    fn any_numbers_survive_the_effective_form(
        min in 1_u32..=60, more in 0_u32..=59, slots in 1_u32..=65_536, body_kib in 1_u64..=1_048_576,
        in_flight_max in 0_u32..=4096, queue in 0_u32..=65_536,
        total_ms in 1_u64..=604_800_000, drain_ms in 0_u64..=604_800_000,
        model in "[!-~]{1,128}", target in "[ -~äöü]{1,64}", host in "[a-z][a-z0-9-]{0,20}", port in 1_u16..=65_535,
    ) {
        let mut config = nothing(&no_env).sealed.config;
        config.workers.min = min;
        config.workers.max = (min + more).min(60);
        config.workers.slots = slots;
        config.limits.body_bytes = body_kib * 1024;
        config.timeouts.total = Duration::from_millis(total_ms);
        config.shutdown.drain = Duration::from_millis(drain_ms);
        let upstream = evergate_core::config::Upstream {
            base_url: format!("https://{host}:{port}/v1").parse().unwrap(),
            api_key: None, roots: Roots::System, any_model: false, is_preset: false, process: None,
            in_flight_max, queue: if in_flight_max > 0 { queue } else { 0 },
        };
        config.upstreams.insert("u".into(), upstream);
        let target = evergate_core::config::Target { upstream: "u".into(), model: target };
        config.models.insert(model, evergate_core::config::Model { targets: vec![target], retry_unknown: false, attempt: None, on_disconnect: OnDisconnect::Cancel });
        let text = effective(&config);
        // The built-in echo cannot stand beside another model of its name.
        if !config.models.contains_key("echo") {
            prop_assert_eq!(&file(&text, &no_env).sealed.config, &config);
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[\\[\\]a-z0-9_.=\"{}\n# ,:/-]{0,300}") {
        let source = Source { name: "x", text: &text, dir: "" };
        let facts = Facts { env: &no_env, cpus: 1, read_file: &read_file };
        let _ = load(Some(&source), &Overrides::default(), &facts);
    }
}

#[test]
fn the_reference_names_every_key_and_preset() {
    let doc = include_str!("../../../docs/configuration.md");
    for shape in SHAPES {
        let name = format!("`[{}]`", shape.section);
        let heading = doc.find(&format!("# {name}")).or_else(|| doc.find(&name));
        let section = match (shape.section, heading) {
            ("", _) => doc,
            (name, None) => panic!("docs/configuration.md does not have [{name}]"),
            // A section of the reference ends where the next one starts.
            (_, Some(start)) => doc[start..].split("\n## ").next().unwrap(),
        };
        for key in shape.keys {
            let wanted = if shape.section.is_empty() { format!("`[{key}") } else { format!("`{key}`") };
            assert!(section.contains(&wanted), "docs/configuration.md lacks {key} of [{}]", shape.section);
        }
        for key in shape.later {
            assert!(doc.contains(&format!("`{key}`")), "docs/configuration.md lacks the later key {key}");
        }
    }
    for preset in presets() {
        let row = format!("| `{}` | `{}` | `{}` |", preset.name, preset.key_env, preset.base_url);
        assert!(doc.contains(&row), "docs/configuration.md lacks {row}");
    }
}

#[test]
fn the_examples_of_the_reference_load() {
    let doc = include_str!("../../../docs/configuration.md");
    let blocks: Vec<&str> = doc.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert!(blocks.len() >= 3);
    let env = |name: &str| {
        Some(format!("{name}-0123456789abcdef")).filter(|_| name.ends_with("KEY") && name != "EVERGATE_API_KEY")
    };
    let read_file = |path: &str| {
        Ok(if path.ends_with(".pem") { "-----BEGIN X-----".into() } else { path.replace('/', "-") + "-0123456789" })
    };
    for text in blocks {
        let source = Source { name: "example", text, dir: "" };
        let facts = Facts { env: &env, cpus: 2, read_file: &read_file };
        if let Err(mistakes) = load(Some(&source), &Overrides::default(), &facts) {
            panic!("{}\n{text}", mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
        }
    }
}
