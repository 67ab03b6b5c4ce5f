//! Every mistake an operator can make in the file, with its line, its column and what is said.

use evergate_core::config::{Facts, Loaded, Mistake, Overrides, Source, load};

const ENV: [(&str, &str); 8] = [
    ("KEY_A", "aaaaaaaaaaaaaaaaaaaaaaaa"),
    ("KEY_B", "bbbbbbbbbbbbbbbbbbbbbbbb"),
    ("KEY_A_AGAIN", "aaaaaaaaaaaaaaaaaaaaaaaa"),
    ("EMPTY", ""),
    ("SPACED", "two words"),
    ("BROKEN", "line\nend"),
    ("UMLAUT", "schlüssel"),
    ("GROQ_API_KEY", ""),
];

fn env(name: &str) -> Option<String> {
    ENV.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
}

fn read_file(path: &str) -> Result<String, String> {
    match path {
        "/etc/evergate/cert.pem" | "/etc/evergate/key.pem" => Ok("-----BEGIN X-----\n".into()),
        "/etc/evergate/note.txt" => Ok("no certificate".into()),
        "/etc/evergate/secret" => Ok("cccccccccccccccccccccccc\n".into()),
        _ => Err("no such file".into()),
    }
}

fn try_load(text: &str, overrides: &Overrides, env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, Vec<Mistake>> {
    let source = Source { name: "evergate.toml", text, dir: "/etc/evergate" };
    load(Some(&source), overrides, &Facts { env, cpus: 4, read_file: &read_file })
}

fn mistakes(text: &str) -> Vec<String> {
    match try_load(text, &Overrides::default(), &env) {
        Ok(_) => Vec::new(),
        Err(mistakes) => mistakes.iter().map(ToString::to_string).collect(),
    }
}

/// A file with one mistake, and how its message begins after `evergate.toml:`.
const TABLE: &[(&str, &str)] = &[
    // TOML itself.
    ("[server\nlisten = 1", "1:8: not TOML: "),
    ("[server]\nauth = \"none", "2:13: not TOML: invalid basic string"),
    ("[server]\nauth = \"none\"\nauth = \"none\"", "3:1: not TOML: duplicate key"),
    ("[workers]\nmin = 1\n[workers]\nmax = 2", "3:2: not TOML: duplicate key"),
    // Names.
    ("[sever]\n", "1:2: unknown section \"sever\"; did you mean \"server\"?"),
    ("[upstream.x]\n", "1:2: unknown section \"upstream\"; did you mean \"upstreams\"?"),
    ("color = 1\n", "1:1: unknown key \"color\"; known here: server, admin,"),
    ("[timeouts]\ntotl = \"1s\"", "2:1: unknown key \"totl\"; did you mean \"total\"?"),
    ("[limits]\nbody_bytes = \"1MiB\"", "2:1: unknown key \"body_bytes\"; did you mean \"body\"?"),
    ("[server]\ntls = { crt = \"cert.pem\", cert = \"cert.pem\", key = \"key.pem\" }", "2:9: unknown key \"crt\"; did"),
    ("[workers]\n  \"ma\\u001bx\" = 1", "2:3: unknown key \"ma\\u{1b}x\"; did you mean \"max\"?"),
    // Later versions.
    ("[cache]\nttl = 1", "1:2: \"cache\" is not in this version"),
    ("[budgets]\n", "1:2: \"budgets\" is not in this version"),
    ("[hosts.a]\n", "1:2: \"hosts\" is not in this version"),
    ("[workers]\nrss_max = \"1MiB\"", "2:11: \"rss_max\" must be 0B (off) or at least 64MiB"),
    ("[workers]\nlifetime_max = \"9s\"", "2:16: \"lifetime_max\" must be 0s (off) or at least 10s"),
    ("[workers]\nbacklog_high = 0", "2:16: \"backlog_high\" must be from 1 to 65536, not 0"),
    ("[upstreams.x]\nprocess = \"cat\"", "2:11: \"process\" must be a table such as { mode"),
    (
        "[upstreams.x]\nprocess = { argv = [\"cat\"] }",
        "2:11: the program lacks \"mode\"; \"mode\" must be \"command\",",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"exec\" }",
        "2:20: \"mode\" must be \"command\", \"stdio\" or \"server\", not",
    ),
    ("[upstreams.x]\nprocess = { mode = \"stdio\" }", "2:11: the program lacks \"argv\", such as"),
    ("[upstreams.x]\nprocess = { mode = \"stdio\", argv = [] }", "2:36: \"argv\" must begin with a program"),
    ("[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\", 1] }", "2:42: \"argv\" must be a string, not an"),
    ("[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\\u0000\"] }", "2:37: \"argv\" must not contain a NUL"),
    (
        "[upstreams.x]\nprocess = { mode = \"server\", argv = [\"vllm\", \"serve\"] }",
        "2:37: a server's \"argv\" must say where it listens: {port} (on 127.0.0.1) or {socket} (a path)",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"command\", argv = [\"tr\"], health = \"/h\" }",
        "2:55: \"health\" is for mode \"server\" only",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"command\", argv = [\"tr\"], idle_stop = \"1m\" }",
        "2:58: \"idle_stop\" is for mode \"stdio\" and \"server\" only",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"command\", argv = [\"tr\"], template = \"{name}\" }",
        "2:57: \"template\" knows {last}, {system} and {messages}, and {{ for a bracket, not \"{name}\"",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"command\", argv = [\"tr\"], input = \"json\", template = \"x\" }",
        "2:73: \"template\" is for input = \"text\" only",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"command\", argv = [\"tr\"], input = \"json\", prompt_arg = true }",
        "2:75: \"prompt_arg\" needs input = \"text\"",
    ),
    (
        "[upstreams.x]\nbase_url = \"https://x/v1\"\nprocess = { mode = \"command\", argv = [\"tr\"] }",
        "2:12: \"base_url\" has no use beside \"process\"; remove one of them",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], min = 3, max = 2 }",
        "2:58: \"max\" is 2 but \"min\" is 3; max must be at least min",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], env = { \"a b\" = \"c\" } }",
        "2:59: \"a b\" is not the name of an environment variable",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], env = { EVERGATE_X = \"c\" } }",
        "2:64: names that begin with EVERGATE_ are the gateway's own",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], env = { A = { env = \"UNSET\" } } }",
        "2:55: the environment variable UNSET is not set",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"server\", argv = [\"a\", \"{port}\"], set = { model = \"y\" } }",
        "2:70: \"model\" is the client's to set; a target's \"model\" names the model",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"server\", argv = [\"a\", \"{port}\"], health = \"up\" }",
        "2:63: \"health\" must be a path such as \"/health\"",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], sandbox = { read = [\"models\"] } }",
        "2:62: \"models\" must be a whole path, from /",
    ),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], user = { uid = 0 } }",
        "2:58: \"uid\" must be from 1 to",
    ),
    ("[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], seccomp = 1 }", "2:43: \"seccomp\" is not in this"),
    (
        "[upstreams.x]\nprocess = { mode = \"stdio\", argv = [\"a\"], cgroup = \"on\" }",
        "2:52: \"cgroup\" must be \"auto\", \"off\" or \"required\"",
    ),
    (
        "[upstreams.x]\nbase_url = \"https://x/v1\"\ndialect = \"anthropic\"",
        "3:11: dialect \"anthropic\" is not in this version; use the provider's OpenAI-compatible address",
    ),
    (
        "[upstreams.x]\nbase_url = \"https://x/v1\"\ndialect = \"opnai\"",
        "3:11: unknown dialect \"opnai\"; did you mean \"openai\"?",
    ),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"KEY_A\" }\nbudget = 5",
        "5:1: \"budget\" is not in this version",
    ),
    // Types and units.
    ("server = 5", "1:1: \"server\" must be a section, [server], not a value (integer)"),
    ("upstreams = []", "1:13: \"upstreams\" must be sections such as [upstreams.NAME], not a value"),
    ("[models]\nx = \"y\"", "2:1: \"x\" must be a section, [models.NAME], not a value (string)"),
    ("[workers]\nslots = \"many\"", "2:9: \"slots\" must be a whole number, not a string"),
    ("[workers]\nslots = 1.5", "2:9: \"slots\" must be a whole number, not a float"),
    ("[workers]\nslots = 0", "2:9: \"slots\" must be from 1 to 65536, not 0"),
    ("[workers]\nslots = 65537", "2:9: \"slots\" must be from 1 to 65536, not 65537"),
    ("[workers]\nslots = -1", "2:9: \"slots\" must be from 1 to 65536, not -1"),
    ("[workers]\nslots = 99999999999999999999", "2:9: \"slots\" must be from 1 to 65536, not 9999999"),
    ("[workers]\nmin = 61", "2:7: \"min\" must be from 1 to 60, not 61"),
    ("[workers]\nmin = 4\nmax = 3", "3:7: \"max\" is 3 but \"min\" is 4; max must be at least min"),
    ("[workers]\nmax = 1", "2:7: \"max\" is 1 but \"min\" is 2 (its default); max must be at least min"),
    ("[timeouts]\ntotal = 30", "2:9: \"total\" must be a duration in quotes, such as \"30s\", not an integer"),
    ("[timeouts]\ntotal = \"30\"", "2:9: \"total\": \"30\" is not a duration; write a whole number and ms, s, m or h"),
    ("[timeouts]\nidle = \"0s\"", "2:8: \"idle\" must be at least 1ms, not 0s"),
    ("[timeouts]\nidle = \"999h\"", "2:8: \"idle\": \"999h\" is longer than a week (168h)"),
    ("[shutdown]\ncancel = \"0s\"", "2:10: \"cancel\" must be at least 1ms, not 0s"),
    ("[limits]\nbody = 1000", "2:8: \"body\" must be a size in quotes, such as \"20MiB\", not an integer"),
    ("[limits]\nbody = \"20\"", "2:8: \"body\": \"20\" is not a size; write"),
    ("[limits]\nbody = \"2GiB\"", "2:8: \"body\" must be from 1KiB to 1GiB, not 2GiB"),
    ("[limits]\njson_depth = 500", "2:14: \"json_depth\" must be from 4 to 128, not 500"),
    ("[limits]\nchoices = 0", "2:11: \"choices\" must be from 1 to 65536, not 0"),
    ("[presets]\nenabled = \"no\"", "2:11: \"enabled\" must be true or false, not a string"),
    // Listeners.
    ("[server]\nlisten = []", "2:10: \"listen\" must name at least one address"),
    (
        "[server]\nlisten = 4700",
        "2:10: \"listen\" must be a list of addresses, such as [\"127.0.0.1:4700\"], not an int",
    ),
    ("[server]\nlisten = [4700]", "2:11: \"listen\" must be a string, not an integer"),
    ("[server]\nlisten = [\"example.com:80\"]", "2:11: \"example.com:80\" is not an address; write IP:PORT"),
    ("[server]\nlisten = [\"unix:\"]", "2:11: a Unix socket needs a path"),
    ("[server]\nlisten = [\"unix:/a\\nb\"]", "2:11: an address must not contain control characters"),
    (
        "[server]\nlisten = [\"127.0.0.1:1\", \"127.0.0.1:1\"]",
        "2:26: \"127.0.0.1:1\" is already taken by \"127.0.0.1:1\"; keep one of them",
    ),
    (
        "[server]\nlisten = [\"unix:/a\", \"unix:/a\"]",
        "2:22: \"unix:/a\" is already taken by \"unix:/a\"; keep one of them",
    ),
    (
        "[server]\nlisten = \"0.0.0.0:4700\"\nauth = \"none\"",
        "2:10: \"0.0.0.0:4700\" can be reached by other machines while auth is \"none\"; set EVERGATE_API_KEY, write",
    ),
    ("[server]\nlisten = [\"[::]:4700\"]", "2:11: \"[::]:4700\" can be reached by other machines"),
    ("[server]\ncors = [\"*\"]", "2:9: \"*\" needs auth = \"keys\"; without keys, name the pages that may call"),
    ("[server]\ncors = [\"null\"]", "2:9: \"null\" is not an origin as browsers write it"),
    ("[server]\ncors = [\"https://app.example/\"]", "2:9: \"https://app.example/\" is not an origin"),
    ("[server]\ncors = [\"https://App.example\"]", "2:9: \"https://App.example\" is not an origin"),
    ("[server]\ncors = [\"https://*.example\"]", "2:9: \"https://*.example\" is not an origin"),
    ("[server]\ncors = [\"https://app.example:443\"]", "2:9: \"https://app.example:443\" is not an origin"),
    ("[server]\ncors = [\"app.example\"]", "2:9: \"app.example\" is not an origin"),
    ("[server]\ncors = \"https://app.example\"", "2:8: "),
    ("[server]\nhosts = [\"http://x\"]", "2:10: \"http://x\" is not a host name; write it without scheme and port"),
    (
        "[server]\nlisten = [\"unix:/a\"]\ntls = { cert = \"cert.pem\", key = \"key.pem\" }",
        "3:7: \"tls\" needs a TCP address in \"listen\"",
    ),
    ("[server]\ntls = { cert = \"cert.pem\" }", "2:7: \"tls\" lacks \"key\""),
    (
        "[server.tls]\ncert = \"cert.pem\"\nkey = \"gone.pem\"",
        "3:7: \"/etc/evergate/gone.pem\" cannot be read: no such",
    ),
    (
        "[server]\ntls = { cert = \"note.txt\", key = \"key.pem\" }",
        "2:16: \"/etc/evergate/note.txt\" is not a PEM file: it has no -----BEGIN line",
    ),
    ("[admin]\nlisten = \"0.0.0.0:1\"", "2:10: the admin listener has no authentication: \"0.0.0.0:1\" must be"),
    ("[admin]\nlisten = \"127.0.0.1:4700\"", "2:10: \"127.0.0.1:4700\" is a public address already"),
    ("[admin]\nlisten = \"off\"", "2:10: \"off\" is not an address"),
    // Keys.
    ("[server]\nauth = \"key\"", "2:8: \"auth\" must be \"none\" or \"keys\"; did you mean \"keys\"?"),
    ("[server]\nauth = \"keys\"", "2:8: \"auth\" is \"keys\" but there is none; write a [keys.NAME] section or set"),
    ("[keys.a]\nsecret = { env = \"KEY_A\" }", "1:7: keys are not asked for unless [server] has auth = \"keys\""),
    ("[server]\nauth = \"keys\"\n[keys.a]\n", "3:7: \"secret\" is missing: { env = \"NAME\" } or { file = \"PATH\" }"),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = \"hunter2hunter2hunter2\"",
        "4:10: \"secret\" must be a reference, { env = \"NAME\" } or { file = \"PATH\" }, never the secret itself",
    ),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"GONE\" }",
        "4:10: the environment variable GONE is not set",
    ),
    ("[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"EMPTY\" }", "4:10: the secret in env:EMPTY is empty"),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"SPACED\" }",
        "4:10: the secret in env:SPACED contains white space or a control character",
    ),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { file = \"gone\" }",
        "4:10: the secret file \"/etc/evergate/gone\" cannot be read: no such file",
    ),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"sk-hunter2\" }",
        "4:18: \"env\" must be the name of an environment variable",
    ),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"KEY_A\", file = \"secret\" }",
        "4:34: \"secret\" has both env and file; keep one",
    ),
    ("[server]\nauth = \"keys\"\n[keys.a]\nsecret = {}", "4:10: \"secret\" must be a reference"),
    (
        "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { env = \"KEY_A\" }\n[keys.b]\nsecret = { env = \"KEY_A_AGAIN\" }",
        "5:7: the keys \"a\" and \"b\" have the same value; make one new",
    ),
    (
        "[server]\nauth = \"keys\"\n[keys.\"team a\"]\nsecret = { env = \"KEY_A\" }",
        "3:7: the key name \"team a\" must be 1 to 64 of letters, digits, _, - and .",
    ),
    // Upstreams.
    ("[upstreams.x]\n", "1:12: \"base_url\" is missing"),
    (
        "[upstreams.echo]\nbase_url = \"https://x\"",
        "1:12: \"echo\" is the built-in model; give the upstream another name",
    ),
    ("[upstreams.X]\nbase_url = \"https://x\"", "1:12: the upstream name \"X\" must be 1 to 64 of a-z, 0-9, _ and -"),
    ("[upstreams.x]\nbase_url = \"x/v1\"", "2:12: \"x/v1\" is not a URL; write https://HOST/v1"),
    ("[upstreams.x]\nbase_url = \"ftp://x/v1\"", "2:12: the scheme \"ftp\" is not supported; use https, http or unix"),
    ("[upstreams.x]\nbase_url = \"https://x/v1?a=b\"", "2:12: the URL has a query or fragment"),
    ("[upstreams.x]\nbase_url = \"https://me:hunter2@x\"", "2:12: the URL carries a user or password; put"),
    (
        "[upstreams.x]\nbase_url = \"http://169.254.169.254/v1\"",
        "2:12: \"169.254.169.254\" is a link-local or cloud metadata address, which is never called",
    ),
    ("[upstreams.x]\nbase_url = \"https://x/v1/chat/completions\"", "2:12: leave out \"/chat/completions\""),
    (
        "[upstreams.x]\nbase_url = \"https://x\"\napi_key = { env = \"BROKEN\" }",
        "3:11: the secret in env:BROKEN contains white space or a control character",
    ),
    (
        "[upstreams.x]\nbase_url = \"https://x\"\napi_key = { env = \"UMLAUT\" }",
        "3:11: the secret in env:UMLAUT contains a non-ASCII character",
    ),
    ("[upstreams.x]\nbase_url = \"https://x\"\nroots = \"mine\"", "3:9: \"roots\" must be \"bundled\", \"system\" or"),
    ("[upstreams.x]\nbase_url = \"https://x\"\nin_flight_max = 4097", "3:17: \"in_flight_max\" must be from 0 to 4096"),
    (
        "[upstreams.x]\nbase_url = \"https://x\"\nin_flight_max = 0\nqueue = 3",
        "4:9: \"queue\" is the line before \"in_flight_max\", which is not set",
    ),
    ("[upstreams.x]\nbase_url = \"https://x\"\nin_flight_max = 1\nqueue = 65537", "4:9: \"queue\" must be from 0 to"),
    ("[upstreams.x]\nbase_url = \"https://x\"\nroots = {}", "3:9: \"roots\" must be \"bundled\", \"system\" or"),
    // Models.
    ("[models.x]\n", "1:9: \"targets\" is missing"),
    ("[models.x]\ntargets = []", "2:11: \"targets\" must not be empty"),
    ("[models.x]\ntargets = [\"openai/x\"]", "2:12: \"targets\" must be a table such as"),
    ("[models.x]\ntargets = [{ model = \"y\" }]", "2:12: the target lacks \"upstream\""),
    ("[models.\"a b\"]\ntargets = [{ upstream = \"echo\" }]", "1:9: the model name \"a b\" must be 1 to 128 visible"),
    ("[models.x]\ntargets = [{ upstream = \"eco\" }]", "2:25: unknown upstream \"eco\"; did you mean \"echo\"?"),
    ("[models.x]\ntargets = [{ upstream = \"opena\" }]", "2:25: unknown upstream \"opena\"; did you mean \"openai\"?"),
    ("[models.x]\ntargets = [{ upstream = \"mine\" }]", "2:25: unknown upstream \"mine\"; write an [upstreams.NAME]"),
    (
        "[models.x]\ntargets = [{ upstream = \"openai\" }]",
        "2:25: the preset \"openai\" needs a usable key in OPENAI_API_KEY; set it, or write [upstreams.openai]",
    ),
    (
        "[presets]\nenabled = false\n[models.x]\ntargets = [{ upstream = \"openai\" }]",
        "4:25: unknown upstream \"openai\"; write an [upstreams.NAME] section for it",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\ntargets = [{ upstream = \"u\" }, { upstream = \"u\" }]",
        "4:32: the model \"x\" of \"u\" is a target already: each is tried once",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\ntargets = [{ upstream = \"u\" }, { upstream = \"echo\" }]",
        "4:32: \"echo\" can only be a model's only target",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\ntargets = [{ upstream = \"echo\" }, { upstream = \"u\" }]",
        "4:12: \"echo\" can only be a model's only target",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\ntargets = [{upstream=\"u\",model=\"1\"},\
         {upstream=\"u\",model=\"2\"},{upstream=\"u\",model=\"3\"},{upstream=\"u\",model=\"4\"},{upstream=\"u\",model=\"5\"},\
         {upstream=\"u\",model=\"6\"},{upstream=\"u\",model=\"7\"},{upstream=\"u\",model=\"8\"},{upstream=\"u\",model=\"9\"}]",
        "4:212: a model has at most 8 targets, not 9",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\ntargets = [{ upstream = \"u\" }]\nretry_unknown = true",
        "5:17: \"retry_unknown\" needs a second target to go on to",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\ntargets = [{ upstream = \"u\" }]\nattempt = \"5s\"",
        "5:11: \"attempt\" needs a second target to go on to",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[timeouts]\ntotal = \"9s\"\n[models.x]\nattempt = \"9s\"\n\
         targets = [{ upstream = \"u\" }, { upstream = \"u\", model = \"y\" }]",
        "6:11: \"attempt\" must be less than timeouts.total (9s), or no other target gets its turn",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\nattempt = \"0s\"\n\
         targets = [{ upstream = \"u\" }, { upstream = \"u\", model = \"y\" }]",
        "4:11: \"attempt\" must be at least 1ms, not 0s",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\non_disconnect = \"drain\"\n\
         targets = [{ upstream = \"u\" }]",
        "4:17: \"on_disconnect\" must be \"cancel\", \"finish\" or a table such as { drain = \"10s\" }",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\non_disconnect = {}\ntargets = [{ upstream = \"u\" }]",
        "4:17: \"on_disconnect\" must be \"cancel\", \"finish\" or a table such as { drain = \"10s\" }",
    ),
    (
        "[models.x]\non_disconnect = \"finish\"\ntargets = [{ upstream = \"echo\" }]",
        "2:17: \"on_disconnect\" needs an upstream: \"echo\" calls nobody",
    ),
    (
        "[upstreams.u]\nbase_url = \"https://u\"\n[models.x]\nretry_unknown = 1\n\
         targets = [{ upstream = \"u\" }, { upstream = \"u\", model = \"y\" }]",
        "4:17: \"retry_unknown\" must be true or false, not an integer",
    ),
    ("[models.x]\ntargets = [{ upstream = \"echo\", weight = 2 }]", "2:33: \"weight\" is not in this version"),
];

#[test]
fn each_mistake_is_named_with_its_place() {
    assert!(TABLE.len() >= 40);
    let mut wrong = Vec::new();
    for (text, expected) in TABLE {
        let found = mistakes(text);
        let is_right = matches!(&found[..], [one] if one.starts_with(&format!("evergate.toml:{expected}")));
        if !is_right {
            wrong.push(format!("{text}\n  expected {expected}\n  found    {}", found.join("\n           ")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn no_message_repeats_a_secret() {
    for (text, _) in TABLE {
        for message in mistakes(text) {
            assert!(!message.contains("hunter2"), "{message}");
            assert!(!message.contains('\n') && !message.contains('\u{1b}'), "{message:?}");
        }
    }
}

#[test]
fn all_mistakes_come_at_once_in_the_order_of_the_file() {
    let text = "\
[server]
listen = [\"0.0.0.0:4700\", \"nonsense\"]
time_out = 5

[workers]
min = \"two\"
slots = 0

[upstreams.a]
base_url = \"http://169.254.169.254\"
api_key = { env = \"GONE\" }

[models.m]
targets = [ { upstream = \"a\" } ]

[models.n]
targets = [ { upstream = \"b\" } ]

[cache]
";
    let found = mistakes(text);
    let starts: Vec<&str> =
        found.iter().map(|text| text.split(": ").next().unwrap().strip_prefix("evergate.toml:").unwrap()).collect();
    assert_eq!(starts, ["2:11", "2:27", "3:1", "6:7", "7:9", "10:12", "11:11", "17:26", "19:2"], "{found:#?}");
}

#[test]
fn what_is_said_outside_the_file_names_the_flag_or_variable() {
    let with_key = |name: &str| match name {
        "EVERGATE_API_KEY" => Some("dddddddddddddddddddddddd".to_owned()),
        _ => env(name),
    };
    let short = |name: &str| (name == "EVERGATE_API_KEY").then(|| "two words".to_owned());
    let flag = |text: &str| Overrides { listen: Some(text.into()), workers: None };
    let workers = |min, max| Overrides { listen: None, workers: Some((min, max)) };
    type Env<'a> = &'a dyn Fn(&str) -> Option<String>;
    let cases: [(&str, Overrides, Env<'_>, &str); 9] = [
        ("", flag("0.0.0.0:4700"), &env, "--listen: \"0.0.0.0:4700\" can be reached by other machines"),
        ("", flag("4700"), &env, "--listen: \"4700\" is not an address"),
        ("[server]\nauth = \"none\"", flag("0.0.0.0:1"), &env, "--listen: \"0.0.0.0:1\" can be reached"),
        ("", workers(0, None), &env, "--workers: the numbers of workers must be from 1 to 60"),
        ("", workers(2, Some(61)), &env, "--workers: the numbers of workers must be from 1 to 60"),
        ("", workers(3, Some(2)), &env, "--workers: the most (2) must be at least the fewest (3)"),
        ("", Overrides::default(), &short, "EVERGATE_API_KEY: the secret in env:EVERGATE_API_KEY contains white space"),
        (
            "[server]\nauth = \"none\"",
            Overrides::default(),
            &with_key,
            "evergate.toml:2:8: \"auth\" is \"none\" but EVERGATE_API_KEY is set; remove one of them",
        ),
        (
            "[keys.default]\nsecret = { env = \"KEY_A\" }",
            Overrides::default(),
            &with_key,
            "evergate.toml:1:7: the name \"default\" belongs to EVERGATE_API_KEY, which is set",
        ),
    ];
    for (text, overrides, env, expected) in cases {
        let found = try_load(text, &overrides, env).unwrap_err();
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].to_string().starts_with(expected), "{} {expected}", found[0]);
    }
}

#[test]
fn hostile_files_are_mistakes_not_panics() {
    let deep = format!("a = {}{}", "[".repeat(5000), "]".repeat(5000));
    let long = format!("[{}]\n", "x".repeat(100_000));
    let many = (0..2000).map(|n| format!("[upstreams.u{n}]\n")).collect::<String>();
    for text in
        [&deep, &long, "\u{0}", "=", "[[server]]", "[[models.x]]\n", "\u{feff}nonsense", "a.b.c = 1", "\"\" = 1"]
    {
        assert!(!mistakes(text).is_empty(), "{}", text.get(..20).unwrap_or(text));
    }
    assert_eq!(mistakes(&many).len(), 2000);
}
