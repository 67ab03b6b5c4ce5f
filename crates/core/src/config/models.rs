//! `[models."NAME"]`: where a model is served, and what may be tried when that fails.

use std::collections::BTreeMap;
use std::time::Duration;

use super::keys::{MODEL, ON_DISCONNECT, TARGET};
use super::mistake::Report;
use super::read::{Section, Value, shown};
use super::units::duration_text;
use super::upstreams::{ECHO, Upstreams};
use super::{Model, OnDisconnect, Target, Timeouts};

/// Most targets of a model. One request calls each once at most, so this bounds what an outage costs; a record names all.
pub(super) const TARGETS_MAX: usize = 8;

/// The models of the file; the built-in one is not among them, but its being wanted is the second part.
pub(super) fn models(
    root: &Section<'_>,
    upstreams: &Upstreams,
    timeouts: &Timeouts,
) -> (BTreeMap<String, Model>, bool) {
    let mut models = BTreeMap::new();
    let mut wants_echo = false;
    for (name, section) in root.named("models", &MODEL) {
        let is_visible = |byte: u8| byte.is_ascii_graphic();
        if !(1..=128).contains(&name.len()) || !name.bytes().all(is_visible) {
            let text = format!("the model name \"{}\" must be 1 to 128 visible ASCII characters", shown(name));
            section.report.mistake(section.place, text);
        }
        let (targets, count) = targets(name, &section, upstreams);
        let is_echo = targets.iter().any(|target| target.upstream == ECHO);
        wants_echo |= is_echo;
        let model = Model {
            targets,
            retry_unknown: retry_unknown(&section, count),
            attempt: attempt(&section, count, timeouts),
            on_disconnect: on_disconnect(&section, is_echo),
        };
        // `[models.echo]` on the built-in model is that model itself, not a second one.
        let is_built_in = is_echo && name == ECHO;
        if !is_built_in && !model.targets.is_empty() {
            models.insert(name.into(), model);
        }
    }
    (models, wants_echo)
}

/// Says that a key is about the next target, if there is none.
fn check_second(section: &Section<'_>, key: &'static str, count: usize) {
    if let Some(value) = section.get(key).filter(|_| count == 1) {
        section.report.mistake(value.place, format!("\"{key}\" needs a second target to go on to"));
    }
}

fn retry_unknown(section: &Section<'_>, count: usize) -> bool {
    check_second(section, "retry_unknown", count);
    section.bool("retry_unknown", false)
}

fn attempt(section: &Section<'_>, count: usize, timeouts: &Timeouts) -> Option<Duration> {
    check_second(section, "attempt", count);
    let place = section.get("attempt")?.place;
    let attempt = section.duration("attempt", Duration::ZERO, Duration::from_millis(1));
    if attempt >= timeouts.total {
        let total = duration_text(timeouts.total);
        let text = format!("\"attempt\" must be less than timeouts.total ({total}), or no other target gets its turn");
        section.report.mistake(place, text);
    } else if attempt >= timeouts.head_hold {
        let hold = duration_text(timeouts.head_hold);
        let text = format!(
            "a stream's head goes out after timeouts.head_hold ({hold}), and no other target is tried after that: \
             let \"attempt\" be less"
        );
        section.report.warn(place, text);
    }
    Some(attempt)
}

fn on_disconnect(section: &Section<'_>, is_echo: bool) -> OnDisconnect {
    let (report, wanted) = (section.report, "\"cancel\", \"finish\" or a table such as { drain = \"10s\" }");
    let Some(value) = section.get("on_disconnect") else { return OnDisconnect::Cancel };
    if is_echo {
        report.mistake(value.place, "\"on_disconnect\" needs an upstream: \"echo\" calls nobody");
    }
    match value.as_text() {
        Some("cancel") => OnDisconnect::Cancel,
        Some("finish") => OnDisconnect::Finish,
        Some(_) => {
            report.mistake(value.place, format!("\"on_disconnect\" must be {wanted}"));
            OnDisconnect::Cancel
        }
        None => {
            let Some(table) = value.section(report, &ON_DISCONNECT, wanted) else { return OnDisconnect::Cancel };
            if table.get("drain").is_none() {
                report.mistake(value.place, format!("\"on_disconnect\" must be {wanted}"));
            }
            OnDisconnect::Drain(table.duration("drain", Duration::ZERO, Duration::from_millis(1)))
        }
    }
}

/// The targets that can be read, and how many were written.
fn targets(name: &str, section: &Section<'_>, upstreams: &Upstreams) -> (Vec<Target>, usize) {
    let report = section.report;
    let wanted = "a list such as [ { upstream = \"openai\", model = \"gpt-4o-mini\" } ]";
    let Some(value) = section.get("targets") else {
        report.mistake(section.place, format!("\"targets\" is missing: {wanted}"));
        return (Vec::new(), 0);
    };
    let Some(items) = value.items(report, wanted) else { return (Vec::new(), 0) };
    if items.is_empty() {
        report.mistake(value.place, format!("\"targets\" must not be empty; write {wanted}"));
    }
    if let Some(extra) = items.get(TARGETS_MAX) {
        report.mistake(extra.place, format!("a model has at most {TARGETS_MAX} targets, not {}", items.len()));
    }
    let mut found: Vec<Target> = Vec::new();
    for item in &items {
        let Some(target) = target(name, report, item, upstreams) else { continue };
        if target.upstream == ECHO && items.len() > 1 {
            let text = "\"echo\" can only be a model's only target: it would hide that the others failed";
            report.mistake(item.place, text);
        } else if found.contains(&target) {
            let (upstream, model) = (shown(&target.upstream), shown(&target.model));
            let text = format!("the model \"{model}\" of \"{upstream}\" is a target already: each is tried once");
            report.mistake(item.place, text);
        }
        found.push(target);
    }
    (found, items.len())
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
