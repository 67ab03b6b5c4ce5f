//! Providers known by name: data, not code. `presets.toml` says where each entry was read.

use serde::Deserialize;

use super::load::Facts;
use super::mistake::{Place, Report};
use super::secrets::Vault;
use super::{BaseUrl, Roots, SecretRef, Upstream};

const TEXT: &str = include_str!("../../presets.toml");

/// One OpenAI-compatible provider.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Preset {
    /// Its name as an upstream; `NAME/<model>` reaches its models.
    pub name: String,
    /// Where its OpenAI-compatible endpoints are.
    pub base_url: String,
    /// The environment variable that holds its key and, when set, turns it on.
    pub key_env: String,
    /// The public page where the base URL was read.
    pub docs: String,
    /// Whether a request through Evergate has been seen to work.
    pub tried: bool,
}

#[derive(Deserialize)]
struct File {
    preset: Vec<Preset>,
}

/// Every provider of the presets file, in its order; empty if the file is broken, which a test rules out.
#[must_use]
pub fn presets() -> Vec<Preset> {
    toml::from_str::<File>(TEXT).map(|file| file.preset).unwrap_or_default()
}

impl Preset {
    /// The upstream it stands for, if its key is set and can be used; nobody asked for this one by name, so a useless
    /// key in the environment is worth a warning and does not keep the gateway from starting.
    pub(super) fn upstream(&self, report: &Report<'_>, vault: &Vault<'_>, facts: &Facts<'_>) -> Option<Upstream> {
        // A variable set to nothing is how people switch one off.
        (facts.env)(&self.key_env).filter(|value| !value.is_empty())?;
        let base_url: BaseUrl = self.base_url.parse().ok()?;
        let reference = SecretRef::Env(self.key_env.clone());
        if let Err(why) = vault.try_fetch(&reference) {
            report.warn(Place::Named("presets"), format!("\"{}\" is left out: {why}", self.name));
            return None;
        }
        Some(Upstream {
            base_url,
            api_key: Some(reference),
            roots: Roots::Bundled,
            any_model: true,
            in_flight_max: 0,
            queue: 0,
            is_preset: true,
            process: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::secrets::is_variable;
    use super::super::upstreams::is_name;
    use super::*;

    #[test]
    fn every_preset_is_well_formed() {
        let file: File = toml::from_str(TEXT).unwrap();
        assert!(file.preset.len() >= 20, "{}", file.preset.len());
        for preset in &file.preset {
            assert!(is_name(&preset.name) && preset.name != "echo", "{preset:?}");
            assert!(preset.base_url.starts_with("https://") && !preset.base_url.ends_with('/'), "{preset:?}");
            let url: BaseUrl = preset.base_url.parse().unwrap();
            assert_eq!(url.to_string(), preset.base_url);
            assert!(is_variable(&preset.key_env) && preset.key_env != super::super::load::KEY_VARIABLE, "{preset:?}");
            assert!(preset.docs.starts_with("https://"), "{preset:?}");
        }
    }

    #[test]
    fn names_and_addresses_are_unique() {
        let all = presets();
        let mut names: Vec<_> = all.iter().map(|preset| &preset.name).collect();
        let mut urls: Vec<_> = all.iter().map(|preset| &preset.base_url).collect();
        for list in [&mut names, &mut urls] {
            list.sort();
            let count = list.len();
            list.dedup();
            assert_eq!(list.len(), count);
        }
    }

    #[test]
    fn the_providers_people_ask_for_are_there() {
        let all = presets();
        for name in ["openai", "anthropic", "google", "deepseek", "mistral", "groq", "together", "openrouter", "xai"] {
            assert!(all.iter().any(|preset| preset.name == name), "{name}");
        }
    }
}
