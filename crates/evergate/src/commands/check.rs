//! `evergate check`: all mistakes at once, or the configuration in force.

use std::time::Duration;

use evergate_core::config::{Config, Loaded, Mistake, duration_text, effective};
use evergate_core::inherit::code;
use serde::Serialize;
use serde_json::Value;

use super::{print, print_json};
use crate::cli::{ConfigArgs, Form};
use crate::lives::compile;

/// Checks and prints; returns the exit code, 78 with mistakes.
#[must_use]
pub fn run(args: &ConfigArgs, form: Form) -> u8 {
    match compile::load(args) {
        Ok(loaded) => good(&loaded, form),
        Err(mistakes) => bad(&mistakes, form),
    }
}

fn good(loaded: &Loaded, form: Form) -> u8 {
    compile::warn(&loaded.warnings);
    let config = &loaded.sealed.config;
    match form {
        Form::Text => print(&effective(config)),
        Form::Json => print_json(&Good { ok: true, warnings: &loaded.warnings, config: json(config) }),
    }
}

fn bad(mistakes: &[Mistake], form: Form) -> u8 {
    compile::report(mistakes);
    if form == Form::Json {
        let mistakes = mistakes.iter().map(|mistake| Entry {
            source: &mistake.source,
            line: mistake.line,
            column: mistake.column,
            message: &mistake.message,
        });
        // The code tells of the mistakes, whatever becomes of the output.
        let _ = print_json(&Bad { ok: false, mistakes: mistakes.collect() });
    }
    code::CONFIG
}

#[derive(Serialize)]
struct Good<'a> {
    ok: bool,
    warnings: &'a [String],
    config: Value,
}

#[derive(Serialize)]
struct Bad<'a> {
    ok: bool,
    mistakes: Vec<Entry<'a>>,
}

#[derive(Serialize)]
struct Entry<'a> {
    source: &'a str,
    line: usize,
    column: usize,
    message: &'a str,
}

/// The configuration with its durations as they are written in the file.
fn json(config: &Config) -> Value {
    let mut value = serde_json::to_value(config).unwrap_or_default();
    write_durations(&mut value);
    value
}

/// Every `{"secs":..,"nanos":..}`, the form that serde gives a `Duration`, becomes a text such as `"10s"`. The tree is as
/// deep as `Config`, whatever the file says.
fn write_durations(value: &mut Value) {
    let number = |fields: &serde_json::Map<String, Value>, key| fields.get(key).and_then(Value::as_u64);
    match value {
        Value::Object(fields) => {
            if let (2, Some(secs), Some(nanos)) = (fields.len(), number(fields, "secs"), number(fields, "nanos")) {
                let duration = Duration::from_secs(secs).saturating_add(Duration::from_nanos(nanos));
                *value = duration_text(duration).into();
                return;
            }
            fields.values_mut().for_each(write_durations);
        }
        Value::Array(values) => values.iter_mut().for_each(write_durations),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_form_has_durations_as_in_the_file_and_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        std::fs::write(folder.path().join("key"), "0123456789abcdef0123").unwrap();
        let text = "[server]\nauth = \"keys\"\n[keys.a]\nsecret = { file = \"key\" }\n[timeouts]\nidle = \"90s\"\n";
        std::fs::write(&path, text).unwrap();
        let loaded = compile::load(&ConfigArgs { config: Some(path), ..ConfigArgs::default() }).unwrap();
        let value = json(&loaded.sealed.config);
        assert_eq!(value["timeouts"]["idle"], duration_text(Duration::from_secs(90)));
        assert!(value["workers"]["hang_timeout"].is_string());
        assert!(!value.to_string().contains("0123456789abcdef"));
    }
}
