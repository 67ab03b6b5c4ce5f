//! The configuration in force, written so that it loads again to the same.

use std::fmt::{self, Write as _};
use std::time::Duration;

use super::units::{duration_text, size_text};
use super::upstreams::ECHO;
use super::{Auth, Config, OnDisconnect, Roots, SecretRef};
use crate::json::write_string;

mod programs;

/// The configuration as TOML, every default written out, secrets as references only. Loaded in the same environment it
/// gives an equal `Config`; paths are as resolved, so that relative ones need the same working folder.
#[must_use]
pub fn effective(config: &Config) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write(&mut out, config);
    out
}

fn write(out: &mut String, config: &Config) -> fmt::Result {
    let server = &config.server;
    writeln!(out, "[server]\nlisten = {}", list(&server.listen))?;
    writeln!(out, "auth = \"{}\"", if server.auth == Auth::Keys { "keys" } else { "none" })?;
    writeln!(out, "hosts = {}\ncors = {}", list(&server.hosts), list(&server.cors))?;
    if let Some(tls) = &server.tls {
        writeln!(out, "tls = {{ cert = {}, key = {} }}", text(&tls.cert), text(&tls.key))?;
    }
    writeln!(out, "\n[admin]\nlisten = {}", text(config.admin_listen.as_deref().unwrap_or("")))?;
    for (name, secret) in &config.keys {
        writeln!(out, "\n[keys.{}]\nsecret = {}", text(name), reference(secret))?;
    }
    numbers(out, config)?;
    times(out, config)?;
    upstreams(out, config)?;
    models(out, config)
}

fn numbers(out: &mut String, config: &Config) -> fmt::Result {
    let (workers, limits) = (&config.workers, &config.limits);
    writeln!(out, "\n[workers]\nmin = {}\nmax = {}\nslots = {}", workers.min, workers.max, workers.slots)?;
    writeln!(out, "backlog_high = {}", workers.backlog_high)?;
    duration(out, "idle_after", workers.idle_after)?;
    duration(out, "boot_timeout", workers.boot_timeout)?;
    duration(out, "hang_timeout", workers.hang_timeout)?;
    writeln!(out, "requests_max = {}", workers.requests_max)?;
    duration(out, "lifetime_max", workers.lifetime_max)?;
    writeln!(out, "rss_max = \"{}\"", size_text(workers.rss_max))?;
    writeln!(out, "rss_total_max = \"{}\"", size_text(workers.rss_total_max))?;
    writeln!(out, "\n[limits]\nbody = \"{}\"", size_text(limits.body_bytes))?;
    writeln!(out, "header = \"{}\"\nheaders = {}", size_text(limits.header_bytes), limits.headers)?;
    writeln!(out, "uri = \"{}\"\njson_depth = {}", size_text(limits.uri_bytes), limits.json_depth)?;
    writeln!(out, "choices = {}", limits.choices)?;
    writeln!(out, "connections = {}\nh2_streams = {}", limits.connections, limits.h2_streams)?;
    writeln!(out, "answer = \"{}\"\nevent = \"{}\"", size_text(limits.answer_bytes), size_text(limits.event_bytes))?;
    writeln!(out, "upstream_idle = {}\nqueue = {}", limits.upstream_idle, limits.queue)?;
    writeln!(out, "memory_guard = {}", limits.memory_guard)
}

fn times(out: &mut String, config: &Config) -> fmt::Result {
    let (timeouts, shutdown) = (&config.timeouts, &config.shutdown);
    writeln!(out, "\n[timeouts]")?;
    for (key, value) in [
        ("total", timeouts.total),
        ("stream_total", timeouts.stream_total),
        ("connect", timeouts.connect),
        ("dns", timeouts.dns),
        ("write", timeouts.write),
        ("first_token", timeouts.first_token),
        ("idle", timeouts.idle),
        ("head_hold", timeouts.head_hold),
        ("keepalive", timeouts.keepalive),
        ("header", timeouts.header),
        ("client_idle", timeouts.client_idle),
        ("client_stall", timeouts.client_stall),
        ("body_idle", timeouts.body_idle),
        ("body", timeouts.body),
        ("upstream_idle", timeouts.upstream_idle),
    ] {
        duration(out, key, value)?;
    }
    writeln!(out, "\n[shutdown]")?;
    duration(out, "settle", shutdown.settle)?;
    duration(out, "drain", shutdown.drain)?;
    duration(out, "cancel", shutdown.cancel)?;
    duration(out, "cleanup", shutdown.cleanup)
}

fn upstreams(out: &mut String, config: &Config) -> fmt::Result {
    let presets = config.upstreams.iter().filter(|(_, upstream)| upstream.is_preset);
    // Without one in force, off and on are the same here, and off stays so when a key appears in the environment.
    writeln!(out, "\n[presets]\nenabled = {}", presets.clone().next().is_some())?;
    for (name, upstream) in presets {
        let key = upstream.api_key.as_ref().map(ToString::to_string).unwrap_or_default();
        writeln!(out, "# {name}/<model>: {} with {key}", upstream.base_url)?;
    }
    for (name, upstream) in config.upstreams.iter().filter(|(_, upstream)| !upstream.is_preset) {
        writeln!(out, "\n[upstreams.{name}]\ndialect = \"openai\"")?;
        if let Some(process) = &upstream.process {
            writeln!(out, "any_model = {}", upstream.any_model)?;
            programs::write(out, name, process)?;
            continue;
        }
        writeln!(out, "base_url = {}", text(&upstream.base_url.to_string()))?;
        if let Some(key) = &upstream.api_key {
            writeln!(out, "api_key = {}", reference(key))?;
        }
        match &upstream.roots {
            Roots::Bundled => writeln!(out, "roots = \"bundled\"")?,
            Roots::System => writeln!(out, "roots = \"system\"")?,
            Roots::File(path) => writeln!(out, "roots = {{ file = {} }}", text(path))?,
        }
        writeln!(out, "any_model = {}\nin_flight_max = {}", upstream.any_model, upstream.in_flight_max)?;
        // Without a limit nobody waits, and a file may not say how many do.
        if upstream.in_flight_max > 0 {
            writeln!(out, "queue = {}", upstream.queue)?;
        }
    }
    Ok(())
}

fn models(out: &mut String, config: &Config) -> fmt::Result {
    let mut targets = config.models.values().flat_map(|model| &model.targets);
    if config.echo && !targets.any(|target| target.upstream == ECHO) {
        writeln!(out, "\n[models.echo]\ntargets = [ {{ upstream = \"echo\", model = \"echo\" }} ]")?;
    }
    for (name, model) in &config.models {
        let targets: Vec<String> = (model.targets.iter())
            .map(|target| format!("{{ upstream = {}, model = {} }}", text(&target.upstream), text(&target.model)))
            .collect();
        writeln!(out, "\n[models.{}]\ntargets = [ {} ]", text(name), targets.join(", "))?;
        // A model with one target has nothing to go on to, and may not say how.
        if targets.len() > 1 {
            writeln!(out, "retry_unknown = {}", model.retry_unknown)?;
        }
        if let Some(attempt) = model.attempt {
            duration(out, "attempt", attempt)?;
        }
        match model.on_disconnect {
            // The built-in model calls nobody, and may not say it.
            OnDisconnect::Cancel => {}
            OnDisconnect::Drain(time) => {
                writeln!(out, "on_disconnect = {{ drain = \"{}\" }}", duration_text(time))?;
            }
            OnDisconnect::Finish => writeln!(out, "on_disconnect = \"finish\"")?,
        }
    }
    Ok(())
}

fn duration(out: &mut String, key: &str, value: Duration) -> fmt::Result {
    writeln!(out, "{key} = \"{}\"", duration_text(value))
}

/// A basic string: JSON's escapes are among TOML's.
fn text(value: &str) -> String {
    let mut out = String::new();
    write_string(&mut out, value);
    out
}

fn list(values: &[String]) -> String {
    let values: Vec<String> = values.iter().map(|value| text(value)).collect();
    format!("[{}]", values.join(", "))
}

fn reference(secret: &SecretRef) -> String {
    match secret {
        SecretRef::Env(name) => format!("{{ env = {} }}", text(name)),
        SecretRef::File(path) => format!("{{ file = {} }}", text(path)),
    }
}
