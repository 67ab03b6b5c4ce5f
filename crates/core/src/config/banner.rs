//! What the operator is told once the first worker is ready.

use super::upstreams::ECHO;
use super::{Auth, Config, SecretRef};
use crate::json::write_string;
use crate::plan::Address;

/// More names than this are counted, not listed.
const NAMES_MAX: usize = 12;

/// The lines of `Plan::banner`: `{listen}` and `{admin}` in them are replaced by the real addresses.
pub(super) fn lines(config: &Config, listen: &[Address]) -> Vec<String> {
    let mut lines = vec!["listening on {listen}".to_owned(), models(config)];
    if config.admin_listen.is_some() {
        lines.push("metrics and status on {admin}".to_owned());
    }
    lines.extend(first_model(config).zip(listen.first()).map(|(model, address)| curl(config, &model, address)));
    lines
}

/// The names that can be called, the built-in one first.
fn names(config: &Config) -> impl Iterator<Item = String> + '_ {
    let echo = config.echo.then(|| ECHO.to_owned());
    let any = config.upstreams.iter().filter(|(_, upstream)| upstream.any_model);
    echo.into_iter().chain(config.models.keys().cloned()).chain(any.map(|(name, _)| format!("{name}/<model>")))
}

fn models(config: &Config) -> String {
    let names: Vec<String> = names(config).collect();
    let Some(rest) = names.len().checked_sub(NAMES_MAX + 1) else {
        return if names.is_empty() { "models: none".into() } else { format!("models: {}", names.join(", ")) };
    };
    let shown: Vec<&str> = names.iter().take(NAMES_MAX).map(String::as_str).collect();
    format!("models: {} and {} more", shown.join(", "), rest + 1)
}

fn first_model(config: &Config) -> Option<String> {
    names(config).next()
}

/// A command line that works as it stands, if the shell knows the key.
fn curl(config: &Config, model: &str, address: &Address) -> String {
    let mut body = String::from("{\"model\":");
    write_string(&mut body, model);
    body.push_str(",\"messages\":[{\"role\":\"user\",\"content\":\"Say hello\"}]}");
    let mut line = String::from("try: curl ");
    match (address, &config.server.tls) {
        (Address::Unix(path), _) => {
            line.push_str(&format!("--unix-socket {} http://localhost", quoted(path)));
        }
        (Address::Tcp(_), Some(tls)) => line.push_str(&format!("--cacert {} {{listen}}", quoted(&tls.cert))),
        (Address::Tcp(_), None) => line.push_str("{listen}"),
    }
    line.push_str("/v1/chat/completions -H 'content-type: application/json'");
    if config.server.auth == Auth::Keys {
        line.push_str(&format!(" -H \"authorization: Bearer {}\"", key(config)));
    }
    line.push_str(&format!(" -d '{}'", body.replace('\'', r"'\''")));
    line
}

/// How a shell gets at one of the keys.
fn key(config: &Config) -> String {
    match config.keys.get("default").or_else(|| config.keys.values().next()) {
        Some(SecretRef::Env(name)) => format!("${name}"),
        Some(SecretRef::File(path)) => format!("$(cat {})", quoted(path)),
        None => "$EVERGATE_API_KEY".into(),
    }
}

/// A word for the shell.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'.' | b'_' | b'-');
    if word.bytes().all(is_plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}
