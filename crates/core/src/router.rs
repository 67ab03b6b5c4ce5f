//! Which model is served where. Pure: the table is made once from the configuration.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::{Config, Model, OnDisconnect, Target, Upstream};
use crate::error::{Error, Fault};

/// Name of the built-in model, and of the target that stands for it in `[models]`.
const ECHO: &str = "echo";

/// Most characters of a model's name that an error repeats.
const NAME_CHARS_MAX: usize = 64;

/// The models and upstreams of one generation.
#[derive(Clone, Debug)]
pub struct Router {
    models: BTreeMap<String, Model>,
    upstreams: BTreeMap<String, Reach>,
    echo: bool,
}

/// An upstream and the label of what is reached by its prefix.
#[derive(Clone, Debug)]
struct Reach {
    upstream: Upstream,
    label: String,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Place<'a> {
    /// The built-in model answers.
    Echo,
    /// An upstream is called.
    Upstream {
        /// Its name in the configuration.
        name: &'a str,
        /// Its section.
        upstream: &'a Upstream,
        /// The model's name there.
        model: &'a str,
    },
}

/// The answer to "who serves this model?".
#[derive(Clone, Debug, PartialEq)]
pub struct Route<'a> {
    /// Where it goes first.
    pub target: Place<'a>,
    /// Where it may go then.
    pub fallback: Fallback<'a>,
    /// What becomes of its call when its client leaves.
    pub on_disconnect: OnDisconnect,
    /// A label from a bounded set: the configured name, or `openai/*` for what is reached by an upstream's prefix.
    pub label: &'a str,
}

/// What may follow the first target.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Fallback<'a> {
    /// In this order; none is `echo`.
    pub targets: &'a [Target],
    /// The model's `retry_unknown`.
    pub retry_unknown: bool,
    /// The model's `attempt`.
    pub attempt: Option<Duration>,
}

impl Router {
    /// Makes the table.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let reach = |(name, upstream): (&String, &Upstream)| {
            (name.clone(), Reach { upstream: upstream.clone(), label: format!("{name}/*") })
        };
        Self {
            models: config.models.clone(),
            upstreams: config.upstreams.iter().map(reach).collect(),
            echo: config.echo,
        }
    }

    /// Finds who serves `model`: an exact entry of `[models]`, else `UPSTREAM/MODEL` where that upstream takes any
    /// model, else the built-in `echo` if it is served.
    ///
    /// # Errors
    /// `ModelNotFound` with param `model`.
    pub fn route<'a>(&'a self, model: &'a str) -> Result<Route<'a>, Error> {
        if let Some((name, entry)) = self.models.get_key_value(model) {
            return self.configured(name, entry);
        }
        if let Some((prefix, rest)) = model.split_once('/')
            && !rest.is_empty()
            && let Some((name, reach)) = self.upstreams.get_key_value(prefix)
            && reach.upstream.any_model
        {
            let target = Place::Upstream { name, upstream: &reach.upstream, model: rest };
            return Ok(Route {
                target,
                fallback: Fallback::default(),
                on_disconnect: OnDisconnect::Cancel,
                label: &reach.label,
            });
        }
        if self.echo && model == ECHO {
            return Ok(Route {
                target: Place::Echo,
                fallback: Fallback::default(),
                on_disconnect: OnDisconnect::Cancel,
                label: ECHO,
            });
        }
        Err(not_found(model))
    }

    /// The names that can be listed: the configured ones in order, and `echo` if it is served. What an upstream's
    /// prefix reaches is not known here and not listed.
    pub fn models(&self) -> impl Iterator<Item = &str> {
        let echo = (self.echo && !self.models.contains_key(ECHO)).then_some(ECHO);
        self.models.keys().map(String::as_str).chain(echo)
    }

    /// The listed model of this name.
    ///
    /// # Errors
    /// `ModelNotFound` with param `model`.
    pub fn find(&self, name: &str) -> Result<&str, Error> {
        match self.models.get_key_value(name) {
            Some((known, _)) => Ok(known),
            None if self.echo && name == ECHO => Ok(ECHO),
            None => Err(not_found(name)),
        }
    }

    /// The upstream that a listed model goes to first; none for `echo`.
    #[must_use]
    pub fn first_upstream(&self, name: &str) -> Option<&str> {
        let target = self.models.get(name)?.targets.first()?;
        self.upstreams.get_key_value(&target.upstream).map(|(name, _)| name.as_str())
    }

    fn configured<'a>(&'a self, name: &'a str, entry: &'a Model) -> Result<Route<'a>, Error> {
        // The configuration's check has made sure of the targets and of their upstreams.
        let bug = |what| Error::new(Fault::Internal, "this model is misconfigured").detail(what);
        let (target, targets) = entry.targets.split_first().ok_or_else(|| bug("a checked model has no target"))?;
        if let Some((upstream, reach)) = self.upstreams.get_key_value(&target.upstream) {
            return Ok(Route {
                target: Place::Upstream { name: upstream, upstream: &reach.upstream, model: &target.model },
                fallback: Fallback { targets, retry_unknown: entry.retry_unknown, attempt: entry.attempt },
                on_disconnect: entry.on_disconnect,
                label: name,
            });
        }
        if target.upstream == ECHO {
            return Ok(Route {
                target: Place::Echo,
                fallback: Fallback::default(),
                on_disconnect: OnDisconnect::Cancel,
                label: name,
            });
        }
        Err(bug("a checked target names no upstream"))
    }
}

fn not_found(model: &str) -> Error {
    let end = model.char_indices().nth(NAME_CHARS_MAX).map(|(at, _)| at);
    let (shown, mark) = match end {
        Some(end) => (model.get(..end).unwrap_or_default(), "..."),
        None => (model, ""),
    };
    let message = format!("the model '{shown}{mark}' does not exist here; GET /v1/models lists the models that do");
    Error::new(Fault::ModelNotFound, message).param("model")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Auth, BaseUrl, Limits, Roots, Server, Shutdown, Target, Timeouts, Transport, Workers};

    fn upstream(any_model: bool) -> Upstream {
        let transport = Transport::Http { host: "127.0.0.1".into(), port: 1 };
        Upstream {
            base_url: BaseUrl { transport, authority: "127.0.0.1:1".into(), path: "/v1".into() },
            api_key: None,
            roots: Roots::Bundled,
            any_model,
            in_flight_max: 0,
            queue: 0,
            is_preset: false,
            process: None,
        }
    }

    fn config(models: &[(&str, &str, &str)], echo: bool) -> Config {
        let model = |(name, upstream, model): &(&str, &str, &str)| {
            let target = Target { upstream: (*upstream).into(), model: (*model).into() };
            (
                (*name).to_owned(),
                Model {
                    targets: vec![target],
                    retry_unknown: false,
                    attempt: None,
                    on_disconnect: OnDisconnect::Cancel,
                },
            )
        };
        let second = Duration::from_secs(1);
        Config {
            server: Server { listen: vec![], auth: Auth::None, hosts: vec![], cors: vec![], tls: None },
            admin_listen: None,
            keys: BTreeMap::new(),
            workers: Workers {
                min: 1,
                max: 1,
                slots: 1,
                backlog_high: 10,
                idle_after: second,
                boot_timeout: second,
                hang_timeout: second,
                requests_max: 0,
                lifetime_max: Duration::ZERO,
                rss_max: 0,
                rss_total_max: 0,
            },
            limits: Limits {
                body_bytes: 1,
                header_bytes: 1,
                headers: 1,
                uri_bytes: 1,
                json_depth: 1,
                choices: 1,
                connections: 1,
                h2_streams: 1,
                answer_bytes: 1,
                event_bytes: 1,
                upstream_idle: 1,
                queue: 1,
                memory_guard: true,
            },
            timeouts: Timeouts {
                total: second,
                stream_total: second,
                connect: second,
                dns: second,
                write: second,
                first_token: second,
                idle: second,
                head_hold: second,
                keepalive: second,
                header: second,
                client_idle: second,
                client_stall: second,
                body_idle: second,
                body: second,
                upstream_idle: second,
            },
            shutdown: Shutdown { settle: second, drain: second, cancel: second, cleanup: second },
            upstreams: BTreeMap::from([("openai".to_owned(), upstream(true)), ("tiny".to_owned(), upstream(false))]),
            models: models.iter().map(model).collect(),
            echo,
        }
    }

    /// Where a model goes: upstream, model there, label.
    fn reached<'a>(router: &'a Router, model: &'a str) -> Option<(&'a str, String, &'a str)> {
        let route = router.route(model).ok()?;
        Some(match route.target {
            Place::Echo => ("echo", String::new(), route.label),
            Place::Upstream { name, model, .. } => (name, model.to_owned(), route.label),
        })
    }

    #[test]
    fn an_entry_goes_before_a_prefix_and_a_prefix_before_nothing() {
        let models = [("gpt", "tiny", "small"), ("openai/gpt-4o", "tiny", "mini"), ("shout", "echo", "echo")];
        let router = Router::new(&config(&models, true));
        for (model, expected) in [
            ("gpt", Some(("tiny", "small", "gpt"))),
            ("openai/gpt-4o", Some(("tiny", "mini", "openai/gpt-4o"))),
            ("openai/gpt-5", Some(("openai", "gpt-5", "openai/*"))),
            ("openai/org/name", Some(("openai", "org/name", "openai/*"))),
            ("shout", Some(("echo", "", "shout"))),
            ("echo", Some(("echo", "", "echo"))),
            ("openai/", None),
            ("openai", None),
            ("tiny/anything", None),
            ("unknown/x", None),
            ("GPT", None),
            ("", None),
        ] {
            let expected = expected.map(|(name, there, label)| (name, there.to_owned(), label));
            assert_eq!(reached(&router, model), expected, "{model}");
        }
    }

    #[test]
    fn c6_an_unknown_model_is_named_in_part_and_the_way_on_is_shown() {
        let router = Router::new(&config(&[], false));
        let error = router.route("echo").unwrap_err();
        assert_eq!((error.fault, error.param.as_deref()), (Fault::ModelNotFound, Some("model")));
        assert!(error.message.contains("'echo'") && error.message.contains("GET /v1/models"), "{error}");
        let long = "é".repeat(1000);
        let message = router.route(&long).unwrap_err().message;
        assert!(message.contains(&format!("'{}...'", "é".repeat(NAME_CHARS_MAX))), "{message}");
    }

    #[test]
    fn the_other_targets_follow_in_order_with_the_models_rules() {
        let mut config = config(&[("gpt", "tiny", "small"), ("one", "tiny", "x")], false);
        let entry = config.models.get_mut("gpt").unwrap();
        let next = Target { upstream: "openai".into(), model: "large".into() };
        entry.targets.push(next.clone());
        (entry.retry_unknown, entry.attempt) = (true, Some(Duration::from_secs(2)));
        let router = Router::new(&config);
        assert_eq!(reached(&router, "gpt"), Some(("tiny", "small".to_owned(), "gpt")));
        let fallback = router.route("gpt").unwrap().fallback;
        let expected = Fallback { targets: &[next], retry_unknown: true, attempt: Some(Duration::from_secs(2)) };
        assert_eq!(fallback, expected);
        for alone in ["one", "openai/x"] {
            assert_eq!(router.route(alone).unwrap().fallback, Fallback::default());
        }
    }

    #[test]
    fn listed_models_are_the_configured_ones_and_echo() {
        let router = Router::new(&config(&[("b", "tiny", "x"), ("a", "tiny", "x")], true));
        assert_eq!(router.models().collect::<Vec<_>>(), ["a", "b", "echo"]);
        assert_eq!((router.first_upstream("a"), router.first_upstream("echo")), (Some("tiny"), None));
        assert_eq!(router.find("echo").unwrap(), "echo");
        assert!(router.find("openai/gpt-4o").is_err());
        let shadowed = Router::new(&config(&[("echo", "tiny", "x")], true));
        assert_eq!(shadowed.models().collect::<Vec<_>>(), ["echo"]);
        assert_eq!(reached(&shadowed, "echo"), Some(("tiny", "x".to_owned(), "echo")));
        let silent = Router::new(&config(&[], false));
        assert!(silent.models().next().is_none() && silent.find("echo").is_err());
    }

    #[test]
    fn an_entry_that_the_check_let_through_wrongly_is_our_fault() {
        let mut config = config(&[("a", "gone", "x"), ("b", "tiny", "x")], false);
        config.models.get_mut("b").unwrap().targets.clear();
        let router = Router::new(&config);
        for model in ["a", "b"] {
            assert_eq!(router.route(model).unwrap_err().fault, Fault::Internal);
        }
    }
}
