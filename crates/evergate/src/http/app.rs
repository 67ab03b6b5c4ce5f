//! What every request of a worker can reach: the configuration made ready.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use evergate_core::chat::Listed;
use evergate_core::config::{BaseUrl, Roots, Sealed, Transport, Upstream};
use evergate_core::inherit::{HOSTS_DIR_VARIABLE, host_socket};
use evergate_core::memory::Rung;
use evergate_core::redact::{Redactor, is_quoted};
use evergate_core::router::Router;
use evergate_core::{Error, Fault};
use evergate_upstream::clock::Clock;
use evergate_upstream::{Client, Resolver, Settings, Trust};
use http::{HeaderMap, HeaderValue};
use tokio::sync::Semaphore;

use super::auth::{Door, credentials};
use super::cors::Cors;
use super::local::{Local, Wake};
use super::model_call::Endpoint;
use crate::gate::Gate;
use crate::gate::memory::Memory;
use crate::gate::permits::Limit;
use crate::lives::dns_fault;
use crate::tasks::Tasks;
use crate::telemetry::talk;

/// A worker's common ground.
#[derive(Debug)]
pub struct App {
    /// The configuration and the values of its secrets.
    pub sealed: Sealed,
    /// Finds a model's place.
    pub router: Router,
    /// Clients by upstream name.
    pub clients: BTreeMap<String, Arc<Client>>,
    /// Limits of calls under way, of those upstreams that have one.
    pub limits: BTreeMap<String, Arc<Limit>>,
    /// Upstreams that are programs of this machine, by name.
    pub locals: BTreeMap<String, Local>,
    /// Who may come in.
    pub door: Door,
    /// Web pages that may call.
    pub cors: Cors,
    /// Admits requests.
    pub gate: Arc<Gate>,
    /// What is given up when memory is short.
    pub memory: Arc<Memory>,
    /// Unix seconds of the process's start; `created` of models.
    pub started_s: u64,
    /// Watches over limits; somebody must run it.
    pub clock: Clock,
    /// Starts what outlives its request.
    pub tasks: Tasks,
    /// Who may read a large body, one at a time: see `scan`.
    pub large: Arc<Semaphore>,
    /// Finds upstreams' addresses.
    pub resolver: Resolver,
    redactor: Arc<Redactor>,
}

impl App {
    /// Makes a configuration ready.
    ///
    /// # Errors
    /// Says which part of it cannot be used.
    pub fn new(
        sealed: Sealed,
        gate: Arc<Gate>,
        tasks: Tasks,
        redactor: Arc<Redactor>,
        wake: &Wake,
    ) -> Result<Self, String> {
        let clock = Clock::new().map_err(|error| format!("no timer could be made: {error}"))?;
        let resolver = dns_fault::resolver(&clock);
        let mut clients = BTreeMap::new();
        let mut locals = BTreeMap::new();
        for (name, upstream) in &sealed.config.upstreams {
            let own;
            let upstream = match &upstream.process {
                None => upstream,
                Some(process) => {
                    let place = (name.as_str(), process.fingerprint(name));
                    let local = Local::new(gate.board().clone(), Arc::clone(wake), place, process.queue);
                    locals.insert(name.clone(), local);
                    own = at_socket(upstream, place.1)?;
                    &own
                }
            };
            clients.insert(name.clone(), Arc::new(client(name, upstream, &sealed, (&clock, &resolver))?));
        }
        let limits = limits(&sealed, &gate, &clock)?;
        let (board, (rss_max, is_on)) =
            (gate.board().clone(), (sealed.config.workers.rss_max, sealed.config.limits.memory_guard));
        let memory = Arc::new(Memory::new(board, gate.row(), rss_max, is_on));
        Ok(Self {
            router: Router::new(&sealed.config),
            door: Door::new(&sealed)?,
            cors: Cors::new(&sealed.config),
            clients,
            locals,
            limits,
            memory,
            gate,
            started_s: evergate_sys::unix_ms() / 1000,
            sealed,
            clock,
            large: Arc::new(Semaphore::new(1)),
            resolver,
            tasks,
            redactor,
        })
    }

    /// A model for the list. Its state is that of the program that it goes to first: where that is another server, a
    /// program behind it may be cold while the model is there.
    #[must_use]
    pub fn listed<'a>(&self, name: &'a str) -> Listed<'a> {
        let local = self.router.first_upstream(name).and_then(|upstream| self.locals.get(upstream));
        Listed { name, state: local.map(|local| local.shown().name()) }
    }

    /// Whether descriptors or memory are short, so that no connection is kept beyond its answer.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.gate.is_short() || self.memory.rung() >= Rung::Close
    }

    /// For calls to the host of another section of an upstream's name, after a reload has replaced its own.
    ///
    /// # Errors
    /// `Internal`: what worked at the start does not any more.
    pub fn client_of_section(&self, name: &str, fingerprint: u64) -> Result<Arc<Client>, Error> {
        let broken = |why: String| Error::new(Fault::Internal, "the program's socket cannot be used").detail(why);
        let upstream = self.sealed.config.upstreams.get(name).ok_or_else(|| broken("no such upstream".into()))?;
        let upstream = at_socket(upstream, fingerprint).map_err(broken)?;
        let client = client(name, &upstream, &self.sealed, (&self.clock, &self.resolver)).map_err(broken)?;
        Ok(Arc::new(client))
    }

    /// Open connections to all upstreams.
    #[must_use]
    pub fn upstream_connections(&self) -> u32 {
        self.clients.values().map(|client| client.connections()).sum()
    }

    /// The error without a secret in its message: a client may have put one where it did not belong, and its words are
    /// repeated in some.
    #[must_use]
    pub fn clean(&self, mut error: Error) -> Error {
        if let Cow::Owned(message) = &error.message {
            error.message = self.redact(message).into();
        }
        error
    }

    /// Whether a word of a client's, such as a model's name, has a secret in it, be it ours or what the client came with:
    /// then it must not go where it stays.
    #[must_use]
    pub fn tells_secret(&self, word: &str, headers: &HeaderMap) -> bool {
        self.redactor.finds(word) || credentials(headers).any(|token| is_quoted(token, word))
    }

    /// Takes every secret out of a text that comes from outside.
    #[must_use]
    pub fn redact(&self, text: &str) -> String {
        self.redactor.redact(text)
    }
}

fn limits(sealed: &Sealed, gate: &Gate, clock: &Clock) -> Result<BTreeMap<String, Arc<Limit>>, String> {
    let limited = sealed.config.upstreams.iter().filter(|(_, upstream)| upstream.in_flight_max > 0);
    let limit = |(name, upstream): (&String, &Upstream)| {
        let (owner, numbers) = ((gate.row(), gate.epoch()), (upstream.in_flight_max, upstream.queue));
        let limit = Limit::new(gate.board(), owner, name, numbers, clock.clone());
        let no_room = || format!("the board has no room for the in_flight_max of {name}: only a restart makes some");
        limit.map(|limit| (name.clone(), limit)).ok_or_else(no_room)
    };
    limited.map(limit).collect()
}

/// The upstream, reached by the socket that the master keeps for its section.
fn at_socket(upstream: &Upstream, fingerprint: u64) -> Result<Upstream, String> {
    let folder = std::env::var_os(HOSTS_DIR_VARIABLE).ok_or("no folder of hosts in the environment")?;
    let path = Path::new(&folder).join(host_socket(fingerprint));
    let path = path.to_str().ok_or("the folder of hosts is not UTF-8")?.to_owned();
    let base_url = BaseUrl { transport: Transport::Unix { path }, ..upstream.base_url.clone() };
    Ok(Upstream { base_url, ..upstream.clone() })
}

fn client(
    name: &str,
    upstream: &Upstream,
    sealed: &Sealed,
    (clock, resolver): (&Clock, &Resolver),
) -> Result<Client, String> {
    let authorization = match &upstream.api_key {
        None => None,
        Some(reference) => {
            let secret =
                sealed.secret(reference).ok_or_else(|| format!("the secret {reference} was not handed over"))?;
            let mut value = HeaderValue::try_from(format!("Bearer {secret}"))
                .map_err(|_| format!("the secret {reference} cannot be a header value"))?;
            value.set_sensitive(true);
            Some(value)
        }
    };
    let pem = match &upstream.roots {
        Roots::File(path) => sealed.files.get(path).cloned(),
        Roots::Bundled | Roots::System => None,
    };
    let config = &sealed.config;
    Client::new(Settings {
        clock: clock.clone(),
        resolver: resolver.clone(),
        complain: |text| talk::print(&format!("evergate worker: {text}")),
        paths: &Endpoint::UPSTREAM_PATHS,
        name: name.to_owned(),
        base_url: upstream.base_url.clone(),
        authorization,
        trust: Trust::new(upstream.roots.clone(), pem),
        connect: config.timeouts.connect,
        dns: config.timeouts.dns,
        write: config.timeouts.write,
        unsent: |socket| evergate_sys::unsent_bytes(socket).ok(),
        idle: config.timeouts.upstream_idle,
        idle_max: config.limits.upstream_idle as usize,
    })
}
