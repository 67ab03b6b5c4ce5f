//! Reads `[upstreams.NAME] process = { ... }`: every mistake at once, and no key that its mode has no use for.

use std::collections::BTreeMap;
use std::time::Duration;

use super::keys::{PROCESS, PROCESS_LIMITS, SANDBOX, USER};
use super::process::{
    Cgroup, Command, EnvValue, Frames, Ids, Input, Mode, Output, Process, ProcessLimits, Replace, Sandbox, Server,
    Stdio,
};
use super::read::{Section, Value, shown};
use super::secrets::{Vault, is_variable};

/// Most arguments of a program, and most entries of its lists.
const LIST_MAX: usize = 256;
const SECOND: Duration = Duration::from_secs(1);
const INSTANT: Duration = Duration::from_millis(1);
const GIB: u64 = 1 << 30;

/// Keys that only some modes know: `c` command, `s` stdio, `h` server (HTTP).
const MODES: &[(&str, &str)] = &[
    ("input", "c"),
    ("output", "c"),
    ("template", "c"),
    ("prompt_arg", "c"),
    ("timeout", "c"),
    ("first_output", "cs"),
    ("idle", "cs"),
    ("min", "s"),
    ("max", "s"),
    ("frames", "s"),
    ("requests_max", "s"),
    ("lifetime_max", "s"),
    ("rss_max", "s"),
    ("preload", "sh"),
    ("idle_stop", "sh"),
    ("group", "sh"),
    ("replace", "sh"),
    ("health", "h"),
    ("health_interval", "h"),
    ("health_timeout", "h"),
    ("base_path", "h"),
    ("stop", "h"),
    ("strip", "h"),
    ("set", "h"),
];

/// The program of an upstream's section, if it has one that can be read.
pub(super) fn process<'a>(upstream: &Section<'a>, vault: &Vault<'a>) -> Option<Process> {
    let value = upstream.get("process")?;
    let wanted = "a table such as { mode = \"server\", argv = [\"llama-server\", \"--port\", \"{port}\"] }";
    let section = value.section(upstream.report, &PROCESS, wanted)?;
    let letter = mode_letter(&section, value)?;
    check_mode(&section, letter);
    let argv = argv(&section, value, letter);
    let mode = match letter {
        'c' => Mode::Command(command(&section)),
        's' => Mode::Stdio(stdio(&section)),
        _ => Mode::Server(server(&section)?),
    };
    let (places, idle_stop) = match &mode {
        Mode::Command(_) => (4, Duration::ZERO),
        // What its processes say that they take.
        Mode::Stdio(_) => (1024, Duration::ZERO),
        Mode::Server(_) => (8, 600 * SECOND),
    };
    let start = if letter == 'c' { 10 } else { 60 };
    Some(Process {
        argv: argv?,
        dir: folder(&section, vault.dir()),
        env: env(&section, vault),
        pass_env: names(&section, "pass_env"),
        grace: section.duration("grace", 5 * SECOND, INSTANT),
        start_timeout: section.duration("start_timeout", start * SECOND, INSTANT),
        in_flight_max: section.u32("in_flight_max", places, 1..=1024),
        queue: section.u32("queue", 64, 0..=65_536),
        output_bytes_max: section.size("output_max", 32 << 20, 1024..=GIB),
        preload: section.bool("preload", false),
        idle_stop: section.duration("idle_stop", idle_stop, Duration::ZERO),
        group: group(&section),
        replace: replace(&section),
        limits: limits(&section),
        sandbox: sandbox(&section),
        cgroup: cgroup(&section),
        user: user(&section),
        mode,
    })
}

fn mode_letter(section: &Section<'_>, value: Value<'_>) -> Option<char> {
    let wanted = "\"mode\" must be \"command\", \"stdio\" or \"server\"";
    let Some((mode, place)) = section.text("mode") else {
        if section.get("mode").is_none() {
            section.report.mistake(value.place, format!("the program lacks \"mode\"; {wanted}"));
        }
        return None;
    };
    match mode {
        "command" => Some('c'),
        "stdio" => Some('s'),
        "server" => Some('h'),
        _ => {
            section.report.mistake(place, format!("{wanted}, not \"{}\"", shown(mode)));
            None
        }
    }
}

/// A key that says nothing in this mode would be ignored: it is refused.
fn check_mode(section: &Section<'_>, letter: char) {
    for (key, modes) in MODES {
        let Some(value) = section.get(key).filter(|_| !modes.contains(letter)) else { continue };
        let names = modes.chars().map(|mode| match mode {
            'c' => "\"command\"",
            's' => "\"stdio\"",
            _ => "\"server\"",
        });
        let names: Vec<_> = names.collect();
        section.report.mistake(value.place, format!("\"{key}\" is for mode {} only", names.join(" and ")));
    }
}

fn argv(section: &Section<'_>, value: Value<'_>, letter: char) -> Option<Vec<String>> {
    if section.get("argv").is_none() {
        section.report.mistake(value.place, "the program lacks \"argv\", such as [\"python3\", \"embed.py\"]");
        return None;
    }
    let argv = words(section, "argv")?;
    let place = section.get("argv")?.place;
    if argv.first().is_none_or(String::is_empty) {
        section.report.mistake(place, "\"argv\" must begin with a program");
        return None;
    }
    let holes = argv.iter().filter(|word| word.contains("{port}") || word.contains("{socket}")).count();
    if letter == 'h' && holes == 0 {
        let text = "a server's \"argv\" must say where it listens: {port} (on 127.0.0.1) or {socket} (a path)";
        section.report.mistake(place, text);
    }
    Some(argv)
}

/// A list of strings without NUL.
fn words(section: &Section<'_>, key: &'static str) -> Option<Vec<String>> {
    let value = section.get(key)?;
    let items = value.items(section.report, "a list of strings")?;
    if let Some(extra) = items.get(LIST_MAX) {
        section.report.mistake(extra.place, format!("\"{key}\" has at most {LIST_MAX} entries"));
        return None;
    }
    let mut found = Vec::new();
    for item in &items {
        let text = item.text(section.report)?;
        if text.contains('\0') {
            section.report.mistake(item.place, format!("\"{key}\" must not contain a NUL character"));
            return None;
        }
        found.push(text.to_owned());
    }
    Some(found)
}

/// The names of environment variables.
fn names(section: &Section<'_>, key: &'static str) -> Vec<String> {
    let found = words(section, key).unwrap_or_default();
    if let (Some(wrong), Some(value)) = (found.iter().find(|name| !is_variable(name)), section.get(key)) {
        let text = format!("\"{}\" is not the name of an environment variable", shown(wrong));
        section.report.mistake(value.place, text);
    }
    found
}

fn folder(section: &Section<'_>, base: &str) -> Option<String> {
    let (path, place) = section.text("dir")?;
    if path.is_empty() || path.contains('\0') {
        section.report.mistake(place, "\"dir\" must be a folder's path");
        return None;
    }
    let is_whole = path.starts_with('/') || base.is_empty();
    Some(if is_whole { path.into() } else { format!("{}/{path}", base.trim_end_matches('/')) })
}

fn env<'a>(section: &Section<'a>, vault: &Vault<'a>) -> BTreeMap<String, EnvValue> {
    let mut found = BTreeMap::new();
    for (name, value) in section.entries("env") {
        if !is_variable(name) {
            let text = format!("\"{}\" is not the name of an environment variable", shown(name));
            section.report.mistake(value.place, text);
        } else if name.starts_with("EVERGATE_") {
            section.report.mistake(value.place, "names that begin with EVERGATE_ are the gateway's own");
        } else if let Some(text) = value.as_text() {
            if text.contains('\0') {
                section.report.mistake(value.place, "a variable's value must not contain a NUL character");
            }
            found.insert(name.to_owned(), EnvValue::Text(text.to_owned()));
        } else if let Some(reference) = vault.reference(&value) {
            found.insert(name.to_owned(), EnvValue::Secret(reference));
        }
    }
    found
}

fn group(section: &Section<'_>) -> Option<String> {
    let (name, place) = section.text("group")?;
    if !super::upstreams::is_name(name) {
        let text = format!("the group \"{}\" must be 1 to 64 of a-z, 0-9, _ and -", shown(name));
        section.report.mistake(place, text);
    }
    Some(name.to_owned())
}

fn cgroup(section: &Section<'_>) -> Cgroup {
    match section.text("cgroup") {
        None | Some(("auto", _)) => Cgroup::Auto,
        Some(("off", _)) => Cgroup::Off,
        Some(("required", _)) => Cgroup::Required,
        Some((_, place)) => {
            section.report.mistake(place, "\"cgroup\" must be \"auto\", \"off\" or \"required\"");
            Cgroup::Auto
        }
    }
}

fn replace(section: &Section<'_>) -> Replace {
    match section.text("replace") {
        None | Some(("drain", _)) => Replace::Drain,
        Some(("overlap", _)) => Replace::Overlap,
        Some((_, place)) => {
            section.report.mistake(place, "\"replace\" must be \"drain\" or \"overlap\"");
            Replace::Drain
        }
    }
}

fn command(section: &Section<'_>) -> Command {
    let timeout = section.duration("timeout", 60 * SECOND, INSTANT);
    let template = section.text("template");
    let input = match section.text("input") {
        None | Some(("text", _)) => Input::Text(template.map(|(text, _)| text.to_owned())),
        Some(("json", _)) => {
            if let Some((_, place)) = template {
                section.report.mistake(place, "\"template\" is for input = \"text\" only");
            }
            Input::Json
        }
        Some((_, place)) => {
            section.report.mistake(place, "\"input\" must be \"text\" or \"json\"");
            Input::Text(None)
        }
    };
    if let (Input::Text(Some(text)), Some((_, place))) = (&input, template)
        && let Err(why) = check_template(text)
    {
        section.report.mistake(place, why);
    }
    let prompt_arg = section.bool("prompt_arg", false);
    if let Some(value) = section.get("prompt_arg").filter(|_| prompt_arg && input == Input::Json) {
        section.report.mistake(value.place, "\"prompt_arg\" needs input = \"text\"");
    }
    let output = match section.text("output") {
        None | Some(("text", _)) => Output::Text,
        Some(("json", _)) => Output::Json,
        Some(("lines", _)) => Output::Lines,
        Some((_, place)) => {
            section.report.mistake(place, "\"output\" must be \"text\", \"json\" or \"lines\"");
            Output::Text
        }
    };
    Command {
        input,
        output,
        prompt_arg,
        timeout,
        first_output: section.duration("first_output", timeout, INSTANT),
        idle: section.duration("idle", timeout, INSTANT),
    }
}

/// Whether every bracket of a template is one that is filled in, or doubled.
fn check_template(text: &str) -> Result<(), String> {
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        let here = rest.get(at..).unwrap_or_default();
        let known = ["{{", "}}", "{last}", "{system}", "{messages}"].into_iter().find(|word| here.starts_with(word));
        let Some(word) = known else {
            let wrong: String = here.chars().take(16).collect();
            return Err(format!(
                "\"template\" knows {{last}}, {{system}} and {{messages}}, and {{{{ for a bracket, not \"{}\"",
                shown(&wrong)
            ));
        };
        rest = here.get(word.len()..).unwrap_or_default();
    }
    Ok(())
}

fn stdio(section: &Section<'_>) -> Stdio {
    let min = section.u32("min", 1, 1..=64);
    let max = section.u32("max", min, 1..=64);
    if let Some(value) = section.get("max").filter(|_| max < min) {
        section.report.mistake(value.place, format!("\"max\" is {max} but \"min\" is {min}; max must be at least min"));
    }
    let frames = match section.text("frames") {
        None | Some(("lines", _)) => Frames::Lines,
        Some(("length", _)) => Frames::Length,
        Some((_, place)) => {
            section.report.mistake(place, "\"frames\" must be \"lines\" or \"length\"");
            Frames::Lines
        }
    };
    Stdio {
        min,
        max: max.max(min),
        frames,
        first_output: section.duration("first_output", 60 * SECOND, INSTANT),
        idle: section.duration("idle", 60 * SECOND, INSTANT),
        requests_max: section.u32("requests_max", 0, 0..=u32::MAX),
        lifetime_max: section.duration("lifetime_max", Duration::ZERO, Duration::ZERO),
        rss_max: section.size("rss_max", 0, 0..=1024 * GIB),
    }
}

fn server(section: &Section<'_>) -> Option<Server> {
    let path = |key: &'static str, default: &str| {
        let Some((text, place)) = section.text(key) else { return default.to_owned() };
        let is_path = (text.is_empty() && key == "base_path")
            || (text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'#'));
        if !is_path {
            section.report.mistake(place, format!("\"{key}\" must be a path such as \"{default}\""));
        }
        text.trim_end_matches('/').to_owned()
    };
    Some(Server {
        health: path("health", "/health"),
        health_interval: section.duration("health_interval", 10 * SECOND, Duration::ZERO),
        health_timeout: section.duration("health_timeout", 5 * SECOND, INSTANT),
        base_path: path("base_path", "/v1"),
        stop: words(section, "stop").unwrap_or_default(),
        strip: words(section, "strip").unwrap_or_default(),
        set: set(section),
    })
}

/// Fields that are set in requests, as JSON.
fn set(section: &Section<'_>) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for (name, value) in section.entries("set") {
        if matches!(name, "model" | "messages" | "stream") {
            let text = format!("\"{name}\" is the client's to set; a target's \"model\" names the model");
            section.report.mistake(value.place, text);
        }
        match value.to_json() {
            Some(json) => {
                found.insert(name.to_owned(), json);
            }
            None => section.report.mistake(value.place, "a date or a number that JSON does not know cannot be set"),
        }
    }
    found
}

fn limits(section: &Section<'_>) -> ProcessLimits {
    let limits = section.section("limits", &PROCESS_LIMITS);
    let size = |key: &'static str| limits.get(key).map(|_| limits.size(key, GIB, 1 << 20..=1024 * GIB));
    ProcessLimits {
        memory: size("memory"),
        open_files: limits.number("open_files", 16..=1 << 20).map(|(number, _)| number),
        processes: limits.number("processes", 1..=1 << 20).map(|(number, _)| number),
        cpu_s: limits.get("cpu").map(|_| {
            let time = limits.duration("cpu", SECOND, SECOND);
            u32::try_from(time.as_secs()).unwrap_or(u32::MAX)
        }),
        file_size: size("file_size"),
    }
}

fn sandbox(section: &Section<'_>) -> Option<Sandbox> {
    section.get("sandbox")?;
    let sandbox = section.section("sandbox", &SANDBOX);
    let paths = |key: &'static str| {
        let paths = words(&sandbox, key).unwrap_or_default();
        if let (Some(wrong), Some(value)) = (paths.iter().find(|path| !path.starts_with('/')), sandbox.get(key)) {
            section.report.mistake(value.place, format!("\"{}\" must be a whole path, from /", shown(wrong)));
        }
        paths
    };
    Some(Sandbox { read: paths("read"), write: paths("write") })
}

fn user(section: &Section<'_>) -> Option<Ids> {
    section.get("user")?;
    let user = section.section("user", &USER);
    let uid = user.number("uid", 1..=u32::MAX - 1);
    let gid = user.number("gid", 1..=u32::MAX - 1);
    if uid.is_none() && user.get("uid").is_none() {
        section.report.mistake(user.place, "\"user\" must be { uid = 1000, gid = 1000 }");
    }
    let (uid, _) = uid?;
    Some(Ids { uid, gid: gid.map_or(uid, |(gid, _)| gid) })
}
