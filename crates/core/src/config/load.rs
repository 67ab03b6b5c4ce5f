//! From text to a checked configuration: reads every section, then holds the sections against each other.

use std::collections::BTreeMap;

use toml::de::DeTable;

use super::keys::{KEY, ROOT};
use super::mistake::{Mistake, Place, Report};
use super::process::{Mode, PASSED, Process, Replace};
use super::read::{Section, shown};
use super::secrets::Vault;
use super::sections::{self, is_local};
use super::{Auth, Config, Sealed, SecretRef, banner, models, upstreams};
use crate::plan::{Address, HostPlan, Plan};

/// The variable whose value, if it is set and not empty, is required of clients as the key named `default`.
pub const KEY_VARIABLE: &str = "EVERGATE_API_KEY";
/// Where an unconfigured gateway listens.
const LISTEN_DEFAULT: ([u8; 4], u16) = ([127, 0, 0, 1], 4700);
const ADMIN_PORT_DEFAULT: u16 = 4701;
/// Client keys below this many bytes can be guessed by trying.
const KEY_BYTES_WANTED: usize = 16;

/// A configuration file.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Its name as the operator gave it, for messages.
    pub name: &'a str,
    /// Its text.
    pub text: &'a str,
    /// Its folder, against which relative paths in it are resolved; empty for the working folder.
    pub dir: &'a str,
}

/// What the command line says over the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--listen ADDR`, replacing `[server] listen`.
    pub listen: Option<String>,
    /// `--workers MIN[:MAX]`, replacing `[workers] min` and `max`.
    pub workers: Option<(u32, Option<u32>)>,
}

/// What is known of the world.
#[derive(Clone, Copy)]
pub struct Facts<'a> {
    /// An environment variable's value.
    pub env: &'a dyn Fn(&str) -> Option<String>,
    /// Number of CPUs that may be used.
    pub cpus: u32,
    /// A whole file as text, or why it cannot be read.
    pub read_file: &'a dyn Fn(&str) -> Result<String, String>,
}

/// A configuration without mistakes.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// For the children: the configuration with its secrets.
    pub sealed: Sealed,
    /// For the master.
    pub plan: Plan,
    /// What is allowed and most likely not meant, in whole sentences with their place.
    pub warnings: Vec<String>,
}

/// Checks a configuration file, or the built-in defaults when there is none.
///
/// # Errors
/// Every mistake, in the order of the file; a syntax error alone, since nothing after it can be trusted.
pub fn load(source: Option<&Source<'_>>, overrides: &Overrides, facts: &Facts<'_>) -> Result<Loaded, Vec<Mistake>> {
    let Source { name, text, dir } = source.copied().unwrap_or(Source { name: "", text: "", dir: "" });
    let report = Report::new(name, text);
    let tree = match DeTable::parse(text) {
        Ok(tree) => tree.into_inner(),
        Err(error) => {
            let start = error.span().map_or(0, |span| span.start);
            report.mistake(Place::Byte(start), format!("not TOML: {}", error.message().replace('\n', ", ")));
            return Err(report.finish().err().unwrap_or_default());
        }
    };
    let vault = Vault::new(&report, facts, dir);
    let root = Section::new(&report, &ROOT, Place::Byte(0), Some(&tree));
    let (config, mut plan) = read(&root, &vault, overrides, facts, source.is_some());
    let (secrets, files) = vault.into_parts();
    let warnings = report.finish()?;
    plan.banner = banner::lines(&config, &plan.listen);
    let variables = variables(&config, facts);
    Ok(Loaded { sealed: Sealed { config, secrets, files, variables }, plan, warnings })
}

/// What programs get of the gateway's environment: hosts, which start them, have none of it themselves.
fn variables(config: &Config, facts: &Facts<'_>) -> BTreeMap<String, String> {
    let processes = config.upstreams.values().filter_map(|upstream| upstream.process.as_ref());
    let names = processes.flat_map(|process| PASSED.into_iter().chain(process.pass_env.iter().map(String::as_str)));
    names.filter_map(|name| Some((name.to_owned(), (facts.env)(name)?))).collect()
}

/// The master's part of a program.
fn host(name: &str, process: &Process) -> HostPlan {
    HostPlan {
        name: name.to_owned(),
        fingerprint: process.fingerprint(name),
        group: process.group.clone(),
        is_preloaded: process.preload,
        // Nothing is loaded in between two runs of a command.
        overlaps: process.replace == Replace::Overlap || matches!(process.mode, Mode::Command(_)),
        start: process.start_timeout,
        grace: process.end_time(),
    }
}

/// Reads `--workers MIN[:MAX]`.
///
/// # Errors
/// Says what to write.
pub fn parse_workers(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| {
        let wrong = || format!("\"{text}\" is not a number of workers; write MIN or MIN:MAX, such as 2 or 2:4");
        text.parse::<u32>().map_err(|_| wrong())
    };
    match text.split_once(':') {
        None => Ok((number(text)?, None)),
        Some((min, max)) => Ok((number(min)?, Some(number(max)?))),
    }
}

fn read<'a>(
    root: &Section<'a>,
    vault: &Vault<'a>,
    overrides: &Overrides,
    facts: &Facts<'_>,
    has_file: bool,
) -> (Config, Plan) {
    let server = sections::server(root, vault);
    let (keys, auth) = keys(root, vault, server.auth, facts);
    let is_listen_default = server.listen.is_none() && overrides.listen.is_none();
    let listen = listen(root.report, server.listen, overrides.listen.as_deref());
    check_listen(root.report, &listen, auth, server.tls.as_ref().map(|(_, place)| *place));
    let admin = admin(root, &listen);
    let upstreams = upstreams::upstreams(root, vault, facts, sections::presets(root));
    let timeouts = sections::timeouts(root);
    let (models, wants_echo) = models::models(root, &upstreams, &timeouts);
    let listen: Vec<Address> = listen.into_iter().map(|(address, _)| address).collect();
    let workers = sections::workers(root, overrides.workers, facts.cpus);
    upstreams.check_limits(root.report, workers.slots);
    upstreams.check_loops(root.report, &listen);
    let config = Config {
        server: super::Server {
            listen: listen.iter().map(ToString::to_string).collect(),
            auth,
            hosts: server.hosts,
            cors: cors(root.report, server.cors, auth),
            tls: server.tls.map(|(tls, _)| tls),
        },
        admin_listen: admin.as_ref().map(ToString::to_string),
        keys,
        workers,
        limits: sections::limits(root),
        timeouts,
        shutdown: sections::shutdown(root),
        upstreams: upstreams.found,
        models,
        echo: wants_echo || !has_file,
    };
    let plan = Plan { is_listen_default, ..plan(&config, listen, admin) };
    (config, plan)
}

/// Without keys, "every page" would let any page in somebody's browser spend the operator's money.
fn cors(report: &Report<'_>, origins: Vec<(String, Place)>, auth: Auth) -> Vec<String> {
    if let Some((_, place)) = origins.iter().find(|(origin, _)| auth == Auth::None && origin == "*") {
        report.mistake(*place, "\"*\" needs auth = \"keys\"; without keys, name the pages that may call");
    }
    origins.into_iter().map(|(origin, _)| origin).collect()
}

/// The master's part; the banner, which only a configuration without mistakes needs, is left out.
fn plan(config: &Config, listen: Vec<Address>, admin: Option<Address>) -> Plan {
    Plan {
        banner: Vec::new(),
        hosts: config
            .upstreams
            .iter()
            .filter_map(|(name, upstream)| Some(host(name, upstream.process.as_ref()?)))
            .collect(),
        is_listen_default: false,
        is_unguarded: config.server.auth == Auth::None,
        is_tls: config.server.tls.is_some(),
        listen,
        admin,
        workers_min: config.workers.min,
        workers_max: config.workers.max,
        slots: config.workers.slots,
        backlog_high: config.workers.backlog_high,
        idle_after: config.workers.idle_after,
        requests_max: config.workers.requests_max,
        lifetime_max: config.workers.lifetime_max,
        rss_max_kib: config.workers.rss_max.div_ceil(1024),
        rss_total_max_kib: config.workers.rss_total_max.div_ceil(1024),
        boot_timeout: config.workers.boot_timeout,
        hang_timeout: config.workers.hang_timeout,
        settle: config.shutdown.settle,
        drain: config.shutdown.drain,
        cancel: config.shutdown.cancel,
        cleanup: config.shutdown.cleanup,
    }
}

type Keys = BTreeMap<String, SecretRef>;

/// The clients' keys, and whether they are asked for.
fn keys<'a>(root: &Section<'a>, vault: &Vault<'a>, auth: Option<(Auth, Place)>, facts: &Facts<'_>) -> (Keys, Auth) {
    let report = root.report;
    let (mut keys, mut places) = (Keys::new(), Vec::new());
    for (name, section) in root.named("keys", &KEY) {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
        if !(1..=64).contains(&name.len()) || !name.bytes().all(is_plain) {
            let text = format!("the key name \"{}\" must be 1 to 64 of letters, digits, _, - and .", shown(name));
            report.mistake(section.place, text);
        }
        places.push((name, section.place));
        match section.get("secret") {
            None => report.mistake(section.place, "\"secret\" is missing: { env = \"NAME\" } or { file = \"PATH\" }"),
            Some(value) => keys.extend(vault.reference(&value).map(|reference| (name.to_owned(), reference))),
        }
    }
    check_values(report, vault, &keys, &places);
    let variable = (facts.env)(KEY_VARIABLE).is_some_and(|value| !value.is_empty());
    if variable {
        add_variable(report, vault, &mut keys, &places);
    }
    let first = places.iter().map(|(_, place)| *place).min_by_key(|place| match place {
        Place::Byte(at) => *at,
        Place::Named(_) => usize::MAX,
    });
    (keys, decide(report, auth, first, variable))
}

/// Two clients with one key cannot be told apart; a short key can be guessed.
fn check_values(report: &Report<'_>, vault: &Vault<'_>, keys: &Keys, places: &[(&str, Place)]) {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for (name, place) in places {
        let Some(value) = keys.get(*name).and_then(|reference| vault.value(reference)) else { continue };
        if value.len() < KEY_BYTES_WANTED {
            let text = format!("the key \"{name}\" is shorter than {KEY_BYTES_WANTED} bytes and can be guessed");
            report.warn(*place, text);
        }
        if let Some(other) = seen.insert(value, name) {
            report.mistake(*place, format!("the keys \"{other}\" and \"{name}\" have the same value; make one new"));
        }
    }
}

fn add_variable(report: &Report<'_>, vault: &Vault<'_>, keys: &mut Keys, places: &[(&str, Place)]) {
    let reference = SecretRef::Env(KEY_VARIABLE.into());
    if keys.values().any(|key| *key == reference) {
        return;
    }
    if let Some((_, place)) = places.iter().find(|(name, _)| *name == "default") {
        let text = format!("the name \"default\" belongs to {KEY_VARIABLE}, which is set; rename this key or unset it");
        report.mistake(*place, text);
        return;
    }
    vault.fetch(&reference, Place::Named(KEY_VARIABLE));
    let Some(value) = vault.value(&reference) else { return };
    if value.len() < KEY_BYTES_WANTED {
        let text = format!("the key is shorter than {KEY_BYTES_WANTED} bytes and can be guessed");
        report.warn(Place::Named(KEY_VARIABLE), text);
    }
    if let Some((name, _)) = keys.iter().find(|(_, key)| vault.value(key).is_some_and(|other| other == value)) {
        let text = format!("the key has the same value as the key \"{name}\" in the file; make one new");
        report.mistake(Place::Named(KEY_VARIABLE), text);
    }
    keys.insert("default".into(), reference);
}

fn decide(report: &Report<'_>, auth: Option<(Auth, Place)>, first_key: Option<Place>, variable: bool) -> Auth {
    match (auth, first_key, variable) {
        (Some((Auth::None, place)), _, true) => {
            let text = format!("\"auth\" is \"none\" but {KEY_VARIABLE} is set; remove one of them");
            report.mistake(place, text);
            Auth::Keys
        }
        (Some((Auth::Keys, place)), None, false) => {
            let text =
                format!("\"auth\" is \"keys\" but there is none; write a [keys.NAME] section or set {KEY_VARIABLE}");
            report.mistake(place, text);
            Auth::Keys
        }
        (Some((Auth::None, _)) | None, Some(place), false) => {
            report.mistake(place, "keys are not asked for unless [server] has auth = \"keys\"");
            Auth::Keys
        }
        (Some((auth, _)), _, _) => auth,
        (None, _, true) => Auth::Keys,
        (None, None, false) => Auth::None,
    }
}

type Placed = Vec<(Address, Place)>;

/// The addresses to listen on: the flag's, else the file's, else the default.
fn listen(report: &Report<'_>, written: Option<Placed>, flag: Option<&str>) -> Placed {
    let place = Place::Named("--listen");
    match (flag, written) {
        (Some(flag), _) => {
            let address = sections::address(report, flag, place);
            address.map(|address| (address, place)).into_iter().collect()
        }
        (None, Some(written)) => written,
        (None, None) => vec![(Address::Tcp(LISTEN_DEFAULT.into()), place)],
    }
}

fn check_listen(report: &Report<'_>, listen: &Placed, auth: Auth, tls: Option<Place>) {
    for (at, (address, place)) in listen.iter().enumerate() {
        if auth == Auth::None && !is_local(address) {
            let text = format!(
                "\"{address}\" can be reached by other machines while auth is \"none\"; set {KEY_VARIABLE}, write \
                 auth = \"keys\" with a [keys.NAME] section, or listen on 127.0.0.1"
            );
            report.mistake(*place, text);
        }
        if let Some((other, _)) = listen.iter().take(at).find(|(other, _)| is_same(other, address)) {
            let text = format!("\"{address}\" is already taken by \"{other}\"; keep one of them");
            report.mistake(*place, text);
        }
    }
    let has_tcp = listen.iter().any(|(address, _)| matches!(address, Address::Tcp(_)));
    if let Some(place) = tls.filter(|_| !has_tcp && !listen.is_empty()) {
        report.mistake(place, "\"tls\" needs a TCP address in \"listen\"; on a Unix socket nothing is encrypted");
    }
}

/// Whether both cannot be bound at once; port 0 is a new port each time.
fn is_same(one: &Address, other: &Address) -> bool {
    match (one, other) {
        (Address::Tcp(one), Address::Tcp(other)) => {
            let is_any = one.ip().is_unspecified() || other.ip().is_unspecified();
            let is_one = one.ip().to_canonical() == other.ip().to_canonical();
            let overlaps = is_one || (is_any && one.is_ipv4() == other.is_ipv4());
            one.port() != 0 && one.port() == other.port() && overlaps
        }
        (Address::Unix(one), Address::Unix(other)) => one == other,
        _ => false,
    }
}

fn admin(root: &Section<'_>, listen: &Placed) -> Option<Address> {
    let Some(written) = sections::admin(root) else {
        // Who lets the system choose the public port wants no fixed port at all, or two gateways could not start.
        let is_free = |address: &Address| matches!(address, Address::Tcp(address) if address.port() == 0);
        let is_any_free = listen.iter().any(|(address, _)| is_free(address));
        let port = if is_any_free { 0 } else { ADMIN_PORT_DEFAULT };
        return Some(Address::Tcp((LISTEN_DEFAULT.0, port).into()));
    };
    let (address, place) = written?;
    if listen.iter().any(|(other, _)| is_same(other, &address)) {
        root.report
            .mistake(place, format!("\"{address}\" is a public address already; the admin listener needs its own"));
    }
    Some(address)
}
