//! Readers over TOML's tree with spans: each takes what it can, reports what it cannot and goes on with the default.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::de::{DeTable, DeValue};

use super::keys::Shape;
use super::mistake::{Place, Report};
use super::nearest::nearest;
use super::units::{duration_text, parse_duration, parse_size, size_text};

/// One value and where it stands.
#[derive(Clone, Copy)]
pub(super) struct Value<'a> {
    /// The key it belongs to, as messages name it.
    pub(super) key: &'a str,
    /// Its first byte.
    pub(super) place: Place,
    raw: &'a DeValue<'a>,
}

impl<'a> Value<'a> {
    fn wrong_type(&self, report: &Report<'_>, wanted: &str) {
        let article = if matches!(self.raw, DeValue::Integer(_) | DeValue::Array(_)) { "an" } else { "a" };
        let kind = self.raw.type_str();
        report.mistake(self.place, format!("\"{}\" must be {wanted}, not {article} {kind}", self.key));
    }

    /// The text, if it is a string; says nothing otherwise.
    pub(super) fn as_text(&self) -> Option<&'a str> {
        self.raw.as_str()
    }

    pub(super) fn text(&self, report: &Report<'_>) -> Option<&'a str> {
        if self.raw.as_str().is_none() {
            self.wrong_type(report, "a string");
        }
        self.raw.as_str()
    }

    pub(super) fn items(&self, report: &Report<'_>, wanted: &str) -> Option<Vec<Value<'a>>> {
        let Some(items) = self.raw.as_array() else {
            self.wrong_type(report, wanted);
            return None;
        };
        let item = |item: &'a toml::Spanned<DeValue<'a>>| Value {
            key: self.key,
            place: Place::Byte(item.span().start),
            raw: item.get_ref(),
        };
        Some(items.iter().map(item).collect())
    }

    /// The value as JSON; none for what JSON cannot say: a date, an infinity.
    pub(super) fn to_json(self) -> Option<String> {
        json(self.raw)
    }

    pub(super) fn section(&self, report: &'a Report<'a>, shape: &'static Shape, wanted: &str) -> Option<Section<'a>> {
        let Some(table) = self.raw.as_table() else {
            self.wrong_type(report, wanted);
            return None;
        };
        Some(Section::new(report, shape, self.place, Some(table)))
    }
}

/// A table, present or not, whose keys have been held against its shape.
pub(super) struct Section<'a> {
    pub(super) report: &'a Report<'a>,
    /// The section's name in its header, for what is missing from it.
    pub(super) place: Place,
    shape: &'static Shape,
    table: Option<&'a DeTable<'a>>,
}

impl<'a> Section<'a> {
    pub(super) fn new(
        report: &'a Report<'a>,
        shape: &'static Shape,
        place: Place,
        table: Option<&'a DeTable<'a>>,
    ) -> Self {
        let section = Self { report, place, shape, table };
        for (key, value) in table.into_iter().flatten() {
            section.check_key(key.get_ref(), Place::Byte(key.span().start), value.get_ref());
        }
        section
    }

    fn check_key(&self, key: &str, place: Place, value: &DeValue<'_>) {
        if self.shape.keys.contains(&key) {
            return;
        }
        if self.shape.later.contains(&key) {
            self.report.mistake(place, format!("\"{key}\" is not in this version"));
            return;
        }
        let what = if self.shape.section.is_empty() && value.is_table() { "section" } else { "key" };
        let known = self.shape.keys.iter().chain(self.shape.later).copied();
        let hint = nearest(key, known).map_or_else(
            || format!("; known here: {}", self.shape.keys.join(", ")),
            |name| format!("; did you mean \"{name}\"?"),
        );
        self.report.mistake(place, format!("unknown {what} \"{}\"{hint}", shown(key)));
    }

    pub(super) fn get(&self, key: &'static str) -> Option<Value<'a>> {
        debug_assert!(self.shape.keys.contains(&key), "{key} is not among the known keys of {}", self.shape.section);
        let value = self.table?.get(key)?;
        Some(Value { key, place: Place::Byte(value.span().start), raw: value.get_ref() })
    }

    pub(super) fn text(&self, key: &'static str) -> Option<(&'a str, Place)> {
        let value = self.get(key)?;
        Some((value.text(self.report)?, value.place))
    }

    pub(super) fn bool(&self, key: &'static str, default: bool) -> bool {
        let Some(value) = self.get(key) else { return default };
        value.raw.as_bool().unwrap_or_else(|| {
            value.wrong_type(self.report, "true or false");
            default
        })
    }

    /// A whole number in `range`, with its place; none when it is absent or wrong.
    pub(super) fn number(&self, key: &'static str, range: RangeInclusive<u32>) -> Option<(u32, Place)> {
        let value = self.get(key)?;
        let Some(integer) = value.raw.as_integer() else {
            value.wrong_type(self.report, "a whole number");
            return None;
        };
        let number = u32::from_str_radix(integer.as_str(), integer.radix()).ok().filter(|n| range.contains(n));
        if number.is_none() {
            let (low, high) = (range.start(), range.end());
            self.report.mistake(value.place, format!("\"{key}\" must be from {low} to {high}, not {integer}"));
        }
        Some((number?, value.place))
    }

    pub(super) fn u32(&self, key: &'static str, default: u32, range: RangeInclusive<u32>) -> u32 {
        self.number(key, range).map_or(default, |(number, _)| number)
    }

    /// A duration of at least `least`.
    pub(super) fn duration(&self, key: &'static str, default: Duration, least: Duration) -> Duration {
        let Some(value) = self.get(key) else { return default };
        let Some(text) = value.as_text() else {
            value.wrong_type(self.report, "a duration in quotes, such as \"30s\"");
            return default;
        };
        match parse_duration(text) {
            Ok(duration) if duration >= least => duration,
            Ok(_) => {
                let least = duration_text(least);
                self.report.mistake(value.place, format!("\"{key}\" must be at least {least}, not {text}"));
                default
            }
            Err(why) => {
                self.report.mistake(value.place, format!("\"{key}\": {why}"));
                default
            }
        }
    }

    /// A size in bytes within `range`.
    pub(super) fn size(&self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let Some(value) = self.get(key) else { return default };
        let Some(text) = value.as_text() else {
            value.wrong_type(self.report, "a size in quotes, such as \"20MiB\"");
            return default;
        };
        match parse_size(text) {
            Ok(size) if range.contains(&size) => size,
            Ok(_) => {
                let (low, high) = (size_text(*range.start()), size_text(*range.end()));
                self.report.mistake(value.place, format!("\"{key}\" must be from {low} to {high}, not {text}"));
                default
            }
            Err(why) => {
                self.report.mistake(value.place, format!("\"{key}\": {why}"));
                default
            }
        }
    }

    /// A subsection, empty if it is absent or not a table.
    pub(super) fn section(&self, key: &'static str, shape: &'static Shape) -> Section<'a> {
        debug_assert!(self.shape.keys.contains(&key), "{key} is not among the known keys of {}", self.shape.section);
        let Some((name, value)) = self.table.and_then(|table| table.get_key_value(key)) else {
            return Section::new(self.report, shape, self.place, None);
        };
        let place = Place::Byte(name.span().start);
        if !value.get_ref().is_table() {
            let kind = value.get_ref().type_str();
            self.report
                .mistake(place, format!("\"{key}\" must be a section, [{}], not a value ({kind})", shape.section));
        }
        Section::new(self.report, shape, place, value.get_ref().as_table())
    }

    /// The values of a table whose keys are the operator's choice, such as `env = { NAME = "value" }`.
    pub(super) fn entries(&self, key: &'static str) -> Vec<(&'a str, Value<'a>)> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let Some(table) = value.raw.as_table() else {
            value.wrong_type(self.report, "a table such as { NAME = \"value\" }");
            return Vec::new();
        };
        let entry = |(name, value): (&'a toml::Spanned<std::borrow::Cow<'a, str>>, &'a toml::Spanned<DeValue<'a>>)| {
            let key: &'a str = name.get_ref().as_ref();
            (key, Value { key, place: Place::Byte(value.span().start), raw: value.get_ref() })
        };
        table.iter().map(entry).collect()
    }

    /// The subsections with names of the operator's choice, such as `[upstreams.NAME]`.
    pub(super) fn named(&self, key: &'static str, shape: &'static Shape) -> Vec<(&'a str, Section<'a>)> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let Some(table) = value.raw.as_table() else {
            let text = format!("\"{key}\" must be sections such as [{}], not a value", shape.section);
            self.report.mistake(value.place, text);
            return Vec::new();
        };
        let mut found = Vec::new();
        for (name, value) in table {
            let place = Place::Byte(name.span().start);
            let Some(table) = value.get_ref().as_table() else {
                let (name, kind) = (shown(name.get_ref()), value.get_ref().type_str());
                let text = format!("\"{name}\" must be a section, [{}], not a value ({kind})", shape.section);
                self.report.mistake(place, text);
                continue;
            };
            found.push((name.get_ref().as_ref(), Section::new(self.report, shape, place, Some(table))));
        }
        found
    }
}

fn json(value: &DeValue<'_>) -> Option<String> {
    Some(match value {
        DeValue::String(text) => {
            let mut out = String::new();
            crate::json::write_string(&mut out, text);
            out
        }
        DeValue::Boolean(value) => value.to_string(),
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix()).ok()?.to_string(),
        DeValue::Float(float) => {
            let number: f64 = float.as_str().parse().ok().filter(|number: &f64| number.is_finite())?;
            number.to_string()
        }
        DeValue::Datetime(_) => return None,
        DeValue::Array(items) => {
            let items: Option<Vec<_>> = items.iter().map(|item| json(item.get_ref())).collect();
            format!("[{}]", items?.join(","))
        }
        DeValue::Table(table) => {
            let mut members = Vec::new();
            for (name, value) in table {
                let mut out = String::new();
                crate::json::write_string(&mut out, name.get_ref());
                members.push(format!("{out}:{}", json(value.get_ref())?));
            }
            format!("{{{}}}", members.join(","))
        }
    })
}

/// A name from the file, fit to be printed on a terminal in one line.
pub(super) fn shown(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars().take(64) {
        // Quotes stay as they are; controls, line ends and marks that would change the line do not.
        if matches!(c, '"' | '\'' | '\\') { text.push(c) } else { text.extend(c.escape_debug()) }
    }
    if name.chars().nth(64).is_some() {
        text.push_str("...");
    }
    text
}
