//! The sections with fixed names: what they hold, their defaults and their bounds.

use std::net::IpAddr;
use std::time::Duration;

use super::keys::{ADMIN, LIMITS, PRESETS, SERVER, SHUTDOWN, TIMEOUTS, TLS, WORKERS};
use super::mistake::{Place, Report};
use super::nearest::nearest;
use super::read::{Section, Value, shown};
use super::secrets::Vault;
use super::{Auth, Limits, Shutdown, Timeouts, Tls, Workers};
use crate::plan::Address;

const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Most workers: the board has 64 rows, four of them for the master, the clerk and replacements.
pub(super) const WORKERS_MAX: u32 = 60;
/// Most public listeners; each is a descriptor in every worker.
const LISTENERS_MAX: usize = 16;

/// `[server]` before it is held against the rest.
pub(super) struct Server {
    /// The addresses that were written; none means that the default applies.
    pub(super) listen: Option<Vec<(Address, Place)>>,
    /// What was written; none means that keys decide.
    pub(super) auth: Option<(Auth, Place)>,
    pub(super) hosts: Vec<String>,
    pub(super) cors: Vec<(String, Place)>,
    pub(super) tls: Option<(Tls, Place)>,
}

pub(super) fn server(root: &Section<'_>, vault: &Vault<'_>) -> Server {
    let section = root.section("server", &SERVER);
    let report = section.report;
    Server {
        listen: section.get("listen").map(|value| listen(report, &value)),
        auth: auth(&section),
        hosts: section.get("hosts").map(|value| hosts(report, &value)).unwrap_or_default(),
        cors: section.get("cors").map(|value| cors(report, &value)).unwrap_or_default(),
        tls: section.get("tls").and_then(|value| tls(report, &value, vault)),
    }
}

fn listen(report: &Report<'_>, value: &Value<'_>) -> Vec<(Address, Place)> {
    // One address alone is what people write first.
    let list = if value.as_text().is_some() {
        Some(vec![*value])
    } else {
        value.items(report, "a list of addresses, such as [\"127.0.0.1:4700\"]")
    };
    let Some(items) = list else { return Vec::new() };
    if items.is_empty() {
        report.mistake(value.place, "\"listen\" must name at least one address");
    }
    if items.len() > LISTENERS_MAX {
        report.mistake(value.place, format!("\"listen\" names {} addresses; at most {LISTENERS_MAX}", items.len()));
    }
    let read = |item: &Value<'_>| Some((address(report, item.text(report)?, item.place)?, item.place));
    items.iter().filter_map(read).collect()
}

/// An address, with what is wrong reported at `place`.
pub(super) fn address(report: &Report<'_>, text: &str, place: Place) -> Option<Address> {
    if text.bytes().any(|byte| byte.is_ascii_control()) {
        report.mistake(place, "an address must not contain control characters");
        return None;
    }
    text.parse().map_err(|why: String| report.mistake(place, why)).ok()
}

/// Whether only this machine can reach it.
pub(super) fn is_local(address: &Address) -> bool {
    match address {
        Address::Tcp(address) => match address.ip() {
            IpAddr::V4(v4) => v4.is_loopback(),
            IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(v6.is_loopback(), |v4| v4.is_loopback()),
        },
        Address::Unix(_) => true,
    }
}

fn auth(section: &Section<'_>) -> Option<(Auth, Place)> {
    let (text, place) = section.text("auth")?;
    match text {
        "none" => Some((Auth::None, place)),
        "keys" => Some((Auth::Keys, place)),
        _ => {
            let hint = nearest(text, ["none", "keys"]).map(|name| format!("; did you mean \"{name}\"?"));
            let hint = hint.unwrap_or_default();
            section.report.mistake(place, format!("\"auth\" must be \"none\" or \"keys\"{hint}"));
            None
        }
    }
}

fn hosts(report: &Report<'_>, value: &Value<'_>) -> Vec<String> {
    let mut names = Vec::new();
    for item in value.items(report, "a list of host names").unwrap_or_default() {
        let Some(name) = item.text(report) else { continue };
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > 253 || !name.bytes().all(is_plain) {
            let text = format!("\"{}\" is not a host name; write it without scheme and port", shown(name));
            report.mistake(item.place, text);
            continue;
        }
        names.push(name.to_ascii_lowercase());
    }
    names
}

fn cors(report: &Report<'_>, value: &Value<'_>) -> Vec<(String, Place)> {
    let mut origins = Vec::new();
    for item in value.items(report, "a list of origins, such as [\"https://app.example\"]").unwrap_or_default() {
        let Some(text) = item.text(report) else { continue };
        if text == "*" || is_origin(text) {
            origins.push((text.to_owned(), item.place));
        } else {
            let text = format!(
                "\"{}\" is not an origin as browsers write it: scheme://host or scheme://host:port, in lower case, \
                 without a path and without the scheme's own port",
                shown(text)
            );
            report.mistake(item.place, text);
        }
    }
    origins
}

/// Whether a browser can send it (RFC 6454, 6.2); "null", which any page can have, is none.
fn is_origin(text: &str) -> bool {
    let Some((scheme, host)) = text.split_once("://") else { return false };
    let is_lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let is_scheme = |byte: u8| is_lower(byte) || matches!(byte, b'+' | b'-' | b'.');
    let is_host = |byte: u8| is_lower(byte) || matches!(byte, b'.' | b'-' | b'_' | b':' | b'[' | b']');
    let own_port = if scheme == "https" { ":443" } else { ":80" };
    scheme.starts_with(|first: char| first.is_ascii_lowercase())
        && scheme.bytes().all(is_scheme)
        && (1..=255).contains(&host.len())
        && host.bytes().all(is_host)
        && !host.ends_with(own_port)
}

fn tls<'a>(report: &'a Report<'a>, value: &Value<'a>, vault: &Vault<'_>) -> Option<(Tls, Place)> {
    let section = value.section(report, &TLS, "a table, { cert = \"cert.pem\", key = \"key.pem\" }")?;
    let path = |key: &'static str| {
        if section.get(key).is_none() {
            report.mistake(section.place, format!("\"tls\" lacks \"{key}\": the path of a PEM file"));
        }
        let (path, place) = section.text(key)?;
        vault.file(path, place)
    };
    let (cert, key) = (path("cert"), path("key"));
    Some((Tls { cert: cert?, key: key? }, section.place))
}

/// `[admin]`: the outer `None` when nothing was written, the inner one when it was turned off.
pub(super) fn admin(root: &Section<'_>) -> Option<Option<(Address, Place)>> {
    let section = root.section("admin", &ADMIN);
    let (text, place) = section.text("listen")?;
    if text.is_empty() {
        return Some(None);
    }
    let address = address(section.report, text, place)?;
    if !is_local(&address) {
        let text = format!("the admin listener has no authentication: \"{address}\" must be loopback or unix");
        section.report.mistake(place, text);
    }
    Some(Some((address, place)))
}

/// `[workers]`, with `--workers MIN[:MAX]` over it.
pub(super) fn workers(root: &Section<'_>, flag: Option<(u32, Option<u32>)>, cpus: u32) -> Workers {
    let section = root.section("workers", &WORKERS);
    let report = section.report;
    let written = (section.number("min", 1..=WORKERS_MAX), section.number("max", 1..=WORKERS_MAX));
    let (min, max) = match (flag, written) {
        (Some((min, max)), (_, written)) => {
            check_flag(report, min, max);
            (min, max.or(written.map(|(max, _)| max.max(min))))
        }
        (None, (min, max)) => {
            let least = min.map_or(2, |(min, _)| min);
            if let Some((most, place)) = max.filter(|(most, _)| *most < least) {
                let default = if min.is_none() { " (its default)" } else { "" };
                let text = format!("\"max\" is {most} but \"min\" is {least}{default}; max must be at least min");
                report.mistake(place, text);
            }
            (least, max.map(|(max, _)| max))
        }
    };
    Workers {
        min,
        max: max.unwrap_or_else(|| cpus.clamp(1, WORKERS_MAX).max(min)),
        slots: section.u32("slots", 256, 1..=65_536),
        backlog_high: section.u32("backlog_high", 10, 1..=65_536),
        idle_after: section.duration("idle_after", 30 * SECOND, SECOND),
        requests_max: section.u32("requests_max", 0, 0..=u32::MAX),
        lifetime_max: lifetime(&section),
        rss_max: rss(&section, "rss_max"),
        rss_total_max: rss(&section, "rss_total_max"),
        boot_timeout: section.duration("boot_timeout", 30 * SECOND, SECOND),
        hang_timeout: section.duration("hang_timeout", 10 * SECOND, SECOND),
    }
}

/// A lifetime, or none. No worker is replaced before it has been ready for ten seconds, so that less would be a lie.
fn lifetime(section: &Section<'_>) -> Duration {
    let least = 10 * SECOND;
    let lifetime = section.duration("lifetime_max", Duration::ZERO, Duration::ZERO);
    if !lifetime.is_zero() && lifetime < least {
        let place = section.get("lifetime_max").map_or(section.place, |value| value.place);
        section.report.mistake(place, "\"lifetime_max\" must be 0s (off) or at least 10s");
    }
    lifetime
}

/// A resident set, or none. A worker that has done nothing yet has some 16 MiB: below the least it would be replaced
/// for nothing.
fn rss(section: &Section<'_>, key: &'static str) -> u64 {
    let size = section.size(key, 0, 0..=1024 * GIB);
    if (1..64 * MIB).contains(&size) {
        let place = section.get(key).map_or(section.place, |value| value.place);
        section.report.mistake(place, format!("\"{key}\" must be 0B (off) or at least 64MiB"));
    }
    size
}

fn check_flag(report: &Report<'_>, min: u32, max: Option<u32>) {
    let place = Place::Named("--workers");
    if !(1..=WORKERS_MAX).contains(&min) || max.is_some_and(|max| max > WORKERS_MAX) {
        report.mistake(place, format!("the numbers of workers must be from 1 to {WORKERS_MAX}"));
    } else if let Some(max) = max.filter(|max| *max < min) {
        report.mistake(place, format!("the most ({max}) must be at least the fewest ({min})"));
    }
}

pub(super) fn limits(root: &Section<'_>) -> Limits {
    let section = root.section("limits", &LIMITS);
    Limits {
        body_bytes: section.size("body", 20 * MIB, KIB..=GIB),
        header_bytes: section.size("header", 32 * KIB, KIB..=MIB),
        headers: section.u32("headers", 100, 8..=1000),
        uri_bytes: section.size("uri", 8 * KIB, 256..=64 * KIB),
        // serde_json, which reads what the built-in model answers, stops at 128 by itself.
        json_depth: section.u32("json_depth", 128, 4..=128),
        // OpenAI's own limit of `n`.
        choices: section.u32("choices", 128, 1..=65_536),
        connections: section.u32("connections", 4096, 1..=65_536),
        h2_streams: section.u32("h2_streams", 100, 1..=10_000),
        answer_bytes: section.size("answer", 32 * MIB, KIB..=GIB),
        event_bytes: section.size("event", 4 * MIB, KIB..=256 * MIB),
        upstream_idle: section.u32("upstream_idle", 64, 0..=4096),
        queue: section.u32("queue", 256, 0..=65_536),
        memory_guard: section.bool("memory_guard", true),
    }
}

pub(super) fn timeouts(root: &Section<'_>) -> Timeouts {
    let section = root.section("timeouts", &TIMEOUTS);
    let read = |key, default_s: u32| section.duration(key, default_s * SECOND, MS);
    Timeouts {
        total: read("total", 300),
        stream_total: read("stream_total", 3600),
        connect: read("connect", 5),
        dns: read("dns", 2),
        write: read("write", 30),
        first_token: read("first_token", 60),
        idle: read("idle", 120),
        head_hold: read("head_hold", 10),
        keepalive: read("keepalive", 15),
        header: read("header", 10),
        client_idle: read("client_idle", 75),
        client_stall: read("client_stall", 30),
        body_idle: read("body_idle", 15),
        body: read("body", 120),
        upstream_idle: read("upstream_idle", 60),
    }
}

pub(super) fn shutdown(root: &Section<'_>) -> Shutdown {
    let section = root.section("shutdown", &SHUTDOWN);
    let shutdown = Shutdown {
        settle: section.duration("settle", Duration::ZERO, Duration::ZERO),
        drain: section.duration("drain", 20 * SECOND, Duration::ZERO),
        cancel: section.duration("cancel", SECOND, MS),
        cleanup: section.duration("cleanup", 3 * SECOND, MS),
    };
    let sum = shutdown.settle + shutdown.drain + shutdown.cancel + shutdown.cleanup;
    if sum > 30 * SECOND {
        let text = format!(
            "settle, drain, cancel and cleanup add up to {}: Kubernetes kills after 30s unless \
             terminationGracePeriodSeconds is raised, systemd after TimeoutStopSec",
            super::units::duration_text(sum)
        );
        section.report.warn(section.place, text);
    }
    shutdown
}

/// `[presets] enabled`.
pub(super) fn presets(root: &Section<'_>) -> bool {
    root.section("presets", &PRESETS).bool("enabled", true)
}
