//! `[upstreams.NAME]`, the presets beside them, and `[models."NAME"]`.

use std::collections::{BTreeMap, BTreeSet};

use super::keys::{MODEL, ROOTS, TARGET, UPSTREAM};
use super::load::Facts;
use super::mistake::{Place, Report};
use super::nearest::nearest;
use super::presets::{Preset, presets};
use super::read::{Section, Value, shown};
use super::secrets::Vault;
use super::{BaseUrl, Model, Roots, Target, Upstream};

/// The built-in model's name, as an upstream and as a model.
pub(super) const ECHO: &str = "echo";

const DIALECTS_LATER: [&str; 8] =
    ["anthropic", "gemini", "azure", "bedrock", "vertex", "cohere", "ollama", "responses"];

/// What can be called.
pub(super) struct Upstreams {
    pub(super) found: BTreeMap<String, Upstream>,
    /// Names written in the file, also of those that are wrong: a target may name them without a second complaint.
    written: BTreeSet<String>,
    /// Presets that are not among `found`.
    unset: Vec<Preset>,
}

pub(super) fn upstreams<'a>(root: &Section<'a>, vault: &Vault<'a>, facts: &Facts<'_>, presets_on: bool) -> Upstreams {
    let mut all = Upstreams { found: BTreeMap::new(), written: BTreeSet::new(), unset: Vec::new() };
    for (name, section) in root.named("upstreams", &UPSTREAM) {
        check_name(section.report, name, section.place);
        all.written.insert(name.into());
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
    let base_url = base_url(section);
    let api_key = section.get("api_key").and_then(|value| vault.reference(&value));
    let upstream = Upstream {
        base_url: base_url?,
        api_key,
        roots: roots(section, vault),
        any_model: section.bool("any_model", true),
        is_preset: false,
    };
    if upstream.api_key.is_some() && upstream.base_url.is_exposed() {
        section.report.warn(section.place, "its api_key and every prompt go over the network unencrypted: use https");
    }
    Some(upstream)
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
    if section.get("base_url").is_none() && !section.has_later("process") {
        section.report.mistake(section.place, "\"base_url\" is missing, such as \"https://api.example.com/v1\"");
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

/// The models of the file; the built-in one is not among them, but its being wanted is the second part.
pub(super) fn models(root: &Section<'_>, upstreams: &Upstreams) -> (BTreeMap<String, Model>, bool) {
    let mut models = BTreeMap::new();
    let mut wants_echo = false;
    for (name, section) in root.named("models", &MODEL) {
        let is_visible = |byte: u8| byte.is_ascii_graphic();
        if !(1..=128).contains(&name.len()) || !name.bytes().all(is_visible) {
            let text = format!("the model name \"{}\" must be 1 to 128 visible ASCII characters", shown(name));
            section.report.mistake(section.place, text);
        }
        let targets = targets(name, &section, upstreams);
        let is_echo = targets.iter().any(|target| target.upstream == ECHO);
        wants_echo |= is_echo;
        // `[models.echo]` on the built-in model is that model itself, not a second one.
        let is_built_in = is_echo && name == ECHO;
        if !is_built_in && !targets.is_empty() {
            models.insert(name.into(), Model { targets });
        }
    }
    (models, wants_echo)
}

fn targets(name: &str, section: &Section<'_>, upstreams: &Upstreams) -> Vec<Target> {
    let report = section.report;
    let wanted = "a list such as [ { upstream = \"openai\", model = \"gpt-4o-mini\" } ]";
    let Some(value) = section.get("targets") else {
        report.mistake(section.place, format!("\"targets\" is missing: {wanted}"));
        return Vec::new();
    };
    let Some(items) = value.items(report, wanted) else { return Vec::new() };
    if items.is_empty() {
        report.mistake(value.place, format!("\"targets\" must not be empty; write {wanted}"));
    }
    let found: Vec<(Target, Place)> =
        items.iter().filter_map(|item| Some((target(name, report, item, upstreams)?, item.place))).collect();
    let echo = found.iter().find(|(target, _)| target.upstream == ECHO);
    match (items.get(1), echo) {
        (Some(_), Some((_, place))) => {
            report.mistake(*place, "\"echo\" can only be a model's only target: it would hide that the others failed");
        }
        (Some(second), None) => {
            report.mistake(second.place, "a second target is not in this version; keep the first one only");
        }
        (None, _) => {}
    }
    found.into_iter().map(|(target, _)| target).collect()
}

fn target<'a>(name: &str, report: &'a Report<'a>, item: &Value<'a>, upstreams: &Upstreams) -> Option<Target> {
    let section =
        item.section(report, &TARGET, "a table such as { upstream = \"openai\", model = \"gpt-4o-mini\" }")?;
    if section.get("upstream").is_none() {
        report.mistake(item.place, "the target lacks \"upstream\"");
    }
    let model = match section.get("model") {
        None => name,
        Some(value) => {
            let text = value.text(report)?;
            if !(1..=256).contains(&text.len()) || text.chars().any(char::is_control) {
                report.mistake(value.place, "the target's \"model\" must be 1 to 256 bytes without control characters");
            }
            text
        }
    };
    let (upstream, place) = section.text("upstream")?;
    upstreams.check(report, upstream, place);
    Some(Target { upstream: upstream.into(), model: model.into() })
}

impl Upstreams {
    fn check(&self, report: &Report<'_>, name: &str, place: Place) {
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
