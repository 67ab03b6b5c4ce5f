//! A program's section, written so that it loads again to the same.

use std::fmt::{self, Write as _};

use super::super::process::{Cgroup, Command, EnvValue, Frames, Input, Mode, Output, Process, Replace, Server, Stdio};
use super::{duration, list, reference, size_text, text};

pub(super) fn write(out: &mut String, upstream: &str, process: &Process) -> fmt::Result {
    writeln!(out, "[upstreams.{upstream}.process]")?;
    match &process.mode {
        Mode::Command(mode) => command(out, mode)?,
        Mode::Stdio(mode) => stdio(out, mode)?,
        Mode::Server(mode) => server(out, mode)?,
    }
    writeln!(out, "argv = {}", list(&process.argv))?;
    if let Some(dir) = &process.dir {
        writeln!(out, "dir = {}", text(dir))?;
    }
    let env = process.env.iter().map(|(name, value)| match value {
        EnvValue::Text(value) => format!("{name} = {}", text(value)),
        EnvValue::Secret(secret) => format!("{name} = {}", reference(secret)),
    });
    writeln!(out, "env = {}", table(env))?;
    writeln!(out, "pass_env = {}", list(&process.pass_env))?;
    duration(out, "grace", process.grace)?;
    duration(out, "start_timeout", process.start_timeout)?;
    writeln!(out, "in_flight_max = {}\nqueue = {}", process.in_flight_max, process.queue)?;
    writeln!(out, "output_max = \"{}\"", size_text(process.output_bytes_max))?;
    if !matches!(process.mode, Mode::Command(_)) {
        loading(out, process)?;
    }
    bounds(out, process)
}

/// What only a program that stays has.
fn loading(out: &mut String, process: &Process) -> fmt::Result {
    writeln!(out, "preload = {}", process.preload)?;
    duration(out, "idle_stop", process.idle_stop)?;
    if let Some(group) = &process.group {
        writeln!(out, "group = {}", text(group))?;
    }
    writeln!(out, "replace = \"{}\"", if process.replace == Replace::Drain { "drain" } else { "overlap" })
}

fn bounds(out: &mut String, process: &Process) -> fmt::Result {
    let limits = &process.limits;
    let number = |key: &str, value: Option<u32>| value.map(|value| format!("{key} = {value}"));
    let size = |key: &str, value: Option<u64>| value.map(|value| format!("{key} = \"{}\"", size_text(value)));
    let entries = [
        size("memory", limits.memory),
        number("open_files", limits.open_files),
        number("processes", limits.processes),
        limits.cpu_s.map(|seconds| format!("cpu = \"{seconds}s\"")),
        size("file_size", limits.file_size),
    ];
    writeln!(out, "limits = {}", table(entries.into_iter().flatten()))?;
    let cgroup = match process.cgroup {
        Cgroup::Auto => "auto",
        Cgroup::Off => "off",
        Cgroup::Required => "required",
    };
    writeln!(out, "cgroup = \"{cgroup}\"")?;
    if let Some(sandbox) = &process.sandbox {
        writeln!(out, "sandbox = {{ read = {}, write = {} }}", list(&sandbox.read), list(&sandbox.write))?;
    }
    if let Some(user) = &process.user {
        writeln!(out, "user = {{ uid = {}, gid = {} }}", user.uid, user.gid)?;
    }
    Ok(())
}

fn command(out: &mut String, mode: &Command) -> fmt::Result {
    writeln!(out, "mode = \"command\"")?;
    writeln!(out, "input = \"{}\"", if mode.input == Input::Json { "json" } else { "text" })?;
    if let Input::Text(Some(template)) = &mode.input {
        writeln!(out, "template = {}", text(template))?;
    }
    let output = match mode.output {
        Output::Text => "text",
        Output::Json => "json",
        Output::Lines => "lines",
    };
    writeln!(out, "output = \"{output}\"\nprompt_arg = {}", mode.prompt_arg)?;
    duration(out, "timeout", mode.timeout)?;
    duration(out, "first_output", mode.first_output)?;
    duration(out, "idle", mode.idle)
}

fn stdio(out: &mut String, mode: &Stdio) -> fmt::Result {
    let frames = if mode.frames == Frames::Lines { "lines" } else { "length" };
    writeln!(out, "mode = \"stdio\"\nmin = {}\nmax = {}\nframes = \"{frames}\"", mode.min, mode.max)?;
    duration(out, "first_output", mode.first_output)?;
    duration(out, "idle", mode.idle)?;
    writeln!(out, "requests_max = {}", mode.requests_max)?;
    duration(out, "lifetime_max", mode.lifetime_max)?;
    writeln!(out, "rss_max = \"{}\"", size_text(mode.rss_max))
}

fn server(out: &mut String, mode: &Server) -> fmt::Result {
    writeln!(out, "mode = \"server\"\nhealth = {}", text(&mode.health))?;
    duration(out, "health_interval", mode.health_interval)?;
    duration(out, "health_timeout", mode.health_timeout)?;
    writeln!(out, "base_path = {}\nstop = {}\nstrip = {}", text(&mode.base_path), list(&mode.stop), list(&mode.strip))?;
    writeln!(out, "set = {}", table(mode.set.iter().map(|(name, json)| format!("{} = {}", text(name), toml(json)))))
}

fn table(entries: impl Iterator<Item = String>) -> String {
    let entries: Vec<String> = entries.collect();
    if entries.is_empty() { "{}".into() } else { format!("{{ {} }}", entries.join(", ")) }
}

/// JSON as TOML: the same but for the sign between a name and its value.
fn toml(json: &str) -> String {
    let (mut out, mut is_text, mut is_escaped) = (String::new(), false, false);
    for c in json.chars() {
        if !is_text && c == ':' {
            out.push_str(" = ");
            continue;
        }
        is_text ^= c == '"' && !is_escaped;
        is_escaped = is_text && c == '\\' && !is_escaped;
        out.push(c);
    }
    out
}
