//! `[upstreams.NAME]` and the presets beside them.

use std::collections::{BTreeMap, BTreeSet};

use super::keys::{ROOTS, UPSTREAM};
use super::load::Facts;
use super::mistake::{Place, Report};
use super::nearest::nearest;
use super::presets::{Preset, presets};
use super::programs::process;
use super::read::{Section, shown};
use super::secrets::Vault;
use super::{BaseUrl, Roots, Transport, Upstream};
use crate::plan::Address;

/// The built-in model's name, as an upstream and as a model.
pub(super) const ECHO: &str = "echo";

const DIALECTS_LATER: [&str; 8] =
    ["anthropic", "gemini", "azure", "bedrock", "vertex", "cohere", "ollama", "responses"];

/// Most upstreams with `in_flight_max`: the board has room for these and as many of earlier generations.
const LIMITED_MAX: usize = 64;
/// The shortest line that is the default: less would refuse what a moment's crowd brings.
const QUEUE_LEAST: u32 = 16;

/// What can be called.
pub(super) struct Upstreams {
    pub(super) found: BTreeMap<String, Upstream>,
    /// Names written in the file, also of those that are wrong: a target may name them without a second complaint.
    written: BTreeSet<String>,
    /// Presets that are not among `found`.
    unset: Vec<Preset>,
    /// Where the limits stand.
    limited: Vec<(String, Place)>,
    /// Where base URLs stand.
    urls: Vec<(String, Place)>,
}

pub(super) fn upstreams<'a>(root: &Section<'a>, vault: &Vault<'a>, facts: &Facts<'_>, presets_on: bool) -> Upstreams {
    let mut all = Upstreams {
        found: BTreeMap::new(),
        written: BTreeSet::new(),
        unset: Vec::new(),
        limited: Vec::new(),
        urls: Vec::new(),
    };
    for (name, section) in root.named("upstreams", &UPSTREAM) {
        check_name(section.report, name, section.place);
        all.written.insert(name.into());
        all.limited.extend(section.get("in_flight_max").map(|value| (name.to_owned(), value.place)));
        all.urls.extend(section.get("base_url").map(|value| (name.to_owned(), value.place)));
        if let Some(upstream) = upstream(&section, vault) {
            all.found.insert(name.into(), upstream);
        }
    }
    if !presets_on {
        return all;
    }
    for preset in presets() {
        if all.written.contains(&preset.name) {
            continue;
        }
        match preset.upstream(root.report, vault, facts) {
            Some(upstream) => {
                all.found.insert(preset.name, upstream);
            }
            None => all.unset.push(preset),
        }
    }
    all
}

/// Whether it can be an upstream's name: it stands in model names, labels and header values.
pub(super) fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'))
}

fn check_name(report: &Report<'_>, name: &str, place: Place) {
    if name == ECHO {
        report.mistake(place, "\"echo\" is the built-in model; give the upstream another name");
    } else if !is_name(name) {
        let text = format!("the upstream name \"{}\" must be 1 to 64 of a-z, 0-9, _ and -", shown(name));
        report.mistake(place, text);
    }
}

fn upstream<'a>(section: &Section<'a>, vault: &Vault<'a>) -> Option<Upstream> {
    check_dialect(section);
    if section.get("process").is_some() {
        return local(section, vault);
    }
    let base_url = base_url(section);
    let api_key = section.get("api_key").and_then(|value| vault.reference(&value));
    let (in_flight_max, queue) = in_flight(section);
    let upstream = Upstream {
        base_url: base_url?,
        api_key,
        roots: roots(section, vault),
        any_model: section.bool("any_model", true),
        in_flight_max,
        queue,
        is_preset: false,
        process: None,
    };
    if upstream.api_key.is_some() && upstream.base_url.is_exposed() {
        section.report.warn(section.place, "its api_key and every prompt go over the network unencrypted: use https");
    }
    Some(upstream)
}

/// The limit of calls under way, and the line before it.
fn in_flight(section: &Section<'_>) -> (u32, u32) {
    let max = section.u32("in_flight_max", 0, 0..=4096);
    if max == 0 {
        if let Some(value) = section.get("queue") {
            section.report.mistake(value.place, "\"queue\" is the line before \"in_flight_max\", which is not set");
        }
        return (0, 0);
    }
    (max, section.u32("queue", max.max(QUEUE_LEAST), 0..=65_536))
}

/// An upstream that is a program of this machine: reached by a socket of ours, whose path the processes know.
fn local<'a>(section: &Section<'a>, vault: &Vault<'a>) -> Option<Upstream> {
    for key in ["base_url", "api_key", "roots", "in_flight_max", "queue"] {
        if let Some(value) = section.get(key) {
            section.report.mistake(value.place, format!("\"{key}\" has no use beside \"process\"; remove one of them"));
        }
    }
    let transport = Transport::Unix { path: String::new() };
    Some(Upstream {
        base_url: BaseUrl { transport, authority: "localhost".into(), path: "/v1".into() },
        api_key: None,
        roots: Roots::Bundled,
        any_model: section.bool("any_model", true),
        // Its own section has them.
        in_flight_max: 0,
        queue: 0,
        is_preset: false,
        process: Some(process(section, vault)?),
    })
}

fn check_dialect(section: &Section<'_>) {
    let Some((text, place)) = section.text("dialect") else { return };
    if text == "openai" {
        return;
    }
    let message = if DIALECTS_LATER.contains(&text) {
        format!("dialect \"{text}\" is not in this version; use the provider's OpenAI-compatible address")
    } else {
        let hint = nearest(text, ["openai"]).map_or("; this version has \"openai\"", |_| "; did you mean \"openai\"?");
        format!("unknown dialect \"{}\"{hint}", shown(text))
    };
    section.report.mistake(place, message);
}

fn base_url(section: &Section<'_>) -> Option<BaseUrl> {
    if section.get("base_url").is_none() {
        section
            .report
            .mistake(section.place, "\"base_url\" is missing, such as \"https://api.example.com/v1\", or \"process\"");
    }
    let (text, place) = section.text("base_url")?;
    text.parse().map_err(|why: String| section.report.mistake(place, why)).ok()
}

fn roots<'a>(section: &Section<'a>, vault: &Vault<'a>) -> Roots {
    let wanted = "\"bundled\", \"system\" or { file = \"ca.pem\" }";
    let Some(value) = section.get("roots") else { return Roots::Bundled };
    let report = section.report;
    match value.as_text() {
        Some("bundled") => return Roots::Bundled,
        Some("system") => return Roots::System,
        Some(_) => {
            report.mistake(value.place, format!("\"roots\" must be {wanted}"));
            return Roots::Bundled;
        }
        None => {}
    }
    let Some(table) = value.section(report, &ROOTS, wanted) else { return Roots::Bundled };
    if table.get("file").is_none() {
        report.mistake(value.place, format!("\"roots\" must be {wanted}"));
    }
    let file = table.text("file").and_then(|(path, place)| vault.file(path, place));
    file.map_or(Roots::Bundled, Roots::File)
}

impl Upstreams {
    /// A request to a gateway that calls itself comes back until no slot is left.
    pub(super) fn check_loops(&self, report: &Report<'_>, listen: &[Address]) {
        for (name, place) in &self.urls {
            let Some(url) = self.found.get(name).map(|upstream| &upstream.base_url) else { continue };
            if let Some(own) = listen.iter().find(|address| url.reaches(address)) {
                let text = format!(
                    "\"{name}\" is this gateway itself, which listens on {own}: its requests would go round in a circle"
                );
                report.warn(*place, text);
            }
        }
    }

    /// Holds the limits against the rest.
    pub(super) fn check_limits(&self, report: &Report<'_>, slots: u32) {
        let limited = |(name, place): &(String, Place)| {
            let upstream = self.found.get(name).filter(|upstream| upstream.in_flight_max > 0)?;
            Some((name.clone(), *place, upstream.in_flight_max.saturating_add(upstream.queue)))
        };
        for (at, (name, place, places)) in self.limited.iter().filter_map(limited).enumerate() {
            if at == LIMITED_MAX {
                report.mistake(place, format!("more than {LIMITED_MAX} upstreams have \"in_flight_max\""));
            }
            if places >= slots {
                let text = format!(
                    "\"in_flight_max\" and \"queue\" of \"{name}\" add up to {places}, and a worker has {slots} slots: \
                     while it is full its requests can keep those for other upstreams waiting"
                );
                report.warn(place, text);
            }
        }
    }

    /// Complains about a target that names none of them.
    pub(super) fn check(&self, report: &Report<'_>, name: &str, place: Place) {
        if name == ECHO || self.found.contains_key(name) || self.written.contains(name) {
            return;
        }
        let message = if let Some(preset) = self.unset.iter().find(|preset| preset.name == name) {
            format!(
                "the preset \"{name}\" needs a usable key in {}; set it, or write [upstreams.{name}]",
                preset.key_env
            )
        } else {
            let known = self.written.iter().chain(self.found.keys()).map(String::as_str);
            let presets = self.unset.iter().map(|preset| preset.name.as_str());
            let hint = nearest(name, known.chain(presets).chain([ECHO])).map_or_else(
                || "; write an [upstreams.NAME] section for it".to_owned(),
                |name| format!("; did you mean \"{name}\"?"),
            );
            format!("unknown upstream \"{}\"{hint}", shown(name))
        };
        report.mistake(place, message);
    }
}
